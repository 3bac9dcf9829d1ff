#!/usr/bin/env python3
"""Counts instructions in the inner loops of this crate's assembly, see count-instructions.sh.

    count_instructions.py FILE.s...

For each kernel it counts

- the innermost loop of a microkernel, per multiply-add of a vector;
- the loop of silu(gate)*up, per element;
- spills: vectors that the loop stores to the stack or loads from it (row pointers do not count).

Of the microkernels that differ only in software prefetch, the one without prefetch is listed. The
spills are those of the variant that has most.
"""
import re
import sys

FUSED = re.compile(r"v?f(n?m)(add|la)\w*|vdpbf16ps|bfdot|bfmmla|vfmadd\w*|fmla")
LANES = {"avx512bf16": 16, "avx512": 16, "avx2": 8, "neonbf16": 4, "neon": 4}
STACK = re.compile(r"%[xyz]mm.*\(%rsp|\(%rsp.*%[xyz]mm|\b[qdv]\d+\b.*\[(sp|x29)\b")
BRANCH = re.compile(r"^(j[a-z]+|b(\.\w+)?|cbn?z|tbn?z)$")


def functions(path):
    """Name -> lines of each function."""
    name, lines = None, []
    for line in open(path):
        label = re.match(r"^(_R[\w.]+):", line)
        if label:
            name, lines = label[1], []
        elif name and re.match(r"^\.Lfunc_end", line):
            yield name, lines
            name = None
        elif name:
            lines.append(line.split("//")[0].split("##")[0].rstrip())


def innermost(lines):
    """Yields the bodies of innermost loops: from a label to the last branch back to it."""
    at = {m[1]: i for i, l in enumerate(lines) if (m := re.match(r"^(\.L\w+):", l))}
    loops = {}
    for i, line in enumerate(lines):
        words = line.replace(",", " ").split()
        if len(words) > 1 and BRANCH.match(words[0]) and at.get(words[-1], i) < i:
            loops[at[words[-1]]] = i
    spans = sorted(loops.items())
    inner = [(s, e) for s, e in spans if not any((s2, e2) != (s, e) and s <= s2 and e2 <= e for s2, e2 in spans)]
    for start, end in inner:
        body = [l.strip() for l in lines[start : end + 1]]
        yield [l for l in body if l and not l.startswith((".", "#")) and not l.endswith(":")]


def count(body):
    ops = [line.split()[0] for line in body]
    fused = sum(bool(FUSED.fullmatch(op)) for op in ops)
    return fused, len(ops), sum(bool(STACK.search(line)) for line in body)


STREAMS = {"OneStream": 1, "OneStreamByPages": 1, "FourStreams": 4, "FourStreamsPrefetched": 4}
DTYPES = {"DotBf16": "bf16 dot", "bf16": "bf16", "f16": "f16"}


def dtype(name):
    return next((kind for key, kind in DTYPES.items() if f"{len(key)}{key}" in name), "f32")


def micro(name):
    """Returns (kernel, dtype and product, MR, NV, STREAMS, role) of a microkernel's mangled name.

    Role 0 has no software prefetch.
    """
    if m := re.search(r"3cpu3isa8(neonbf16)5microKj(\w)_", name):
        return m[1], "bf16 bfmmla", int(m[2], 16), 4, 1, 0
    number = r"K(j\w|B\w*?)_"
    kernel = rf"3cpu3isa\d+({'|'.join(sorted(LANES, key=len, reverse=True))})N"
    if not (m := re.search(rf"{kernel}.*8OnePanel(.*?6tuning\d+(\w+?))Kh(\w)_{number}{number}", name)):
        return None
    mr, nv = (constant(name, m[i]) for i in (5, 6))
    return m[1], dtype(m[2]), mr, nv, STREAMS[m[3]], int(m[4], 16)


def constant(name, text):
    """Decodes a number, or a back reference: an offset behind `_R` in base 62 to an earlier number."""
    if text.startswith("B"):
        digits = "0123456789abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ"
        place = 0 if text == "B" else sum(digits.index(d) * 62**i for i, d in enumerate(reversed(text[1:]))) + 1
        text = re.match(r"j\w", name.removeprefix("_R")[place:])[0]
    return int(text[1:], 16)


def main():
    rows, spilled, gates = {}, {}, []
    for path in sys.argv[1:]:
        for name, lines in functions(path):
            if found := micro(name):
                kernel, kind, mr, nv, streams, ahead = found
                best = max((count(body) for body in innermost(lines)), default=(0, 0, 0))
                if kernel in LANES and best[0]:
                    case = (kernel, kind, streams, nv, mr)
                    spilled[case] = max(best[2], spilled.get(case, 0))
                    if ahead == 0:
                        rows[case] = best[:2]
            elif m := re.search(rf"3cpu3isa\d+({'|'.join(LANES)})N.*7Forward(\w+)", name):
                kind = dtype(m[2])
                # Loops with one division, by number of instructions: sigmoid, then silu.
                divisions = lambda body: sum("div" in line.split()[0] for line in body)
                loops = sorted(len(body) for body in innermost(lines) if divisions(body) == 1)
                spills = max((count(body)[2] for body in innermost(lines)), default=0)
                if len(loops) > 1:
                    gates.append((m[1], kind, loops[1], loops[1] / LANES[m[1]], spills))
    print("| kernel | dtype | streams | vectors | rows | multiply-adds in the loop | other instructions per multiply-add | spills |")
    print("|---|---|---|---|---|---|---|---|")
    for case, (fused, total) in sorted(rows.items()):
        cells = [*case, fused, f"{(total - fused) / fused:.2f}", spilled[case]]
        print("|", " | ".join(map(str, cells)), "|")
    print("\n| kernel | dtype | instructions for a vector of silu(gate)*up | per element | spills |\n|---|---|---|---|---|")
    for kernel, kind, total, each, spills in sorted(set(gates)):
        print(f"| {kernel} | {kind} | {total} | {each:.1f} | {spills} |")


main()

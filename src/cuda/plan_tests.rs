//! The names of the kernels and the choices between them.

use super::*;

#[test]
fn indices_are_the_places_among_all() {
    for (place, kernel) in Kernel::all().enumerate() {
        assert_eq!(kernel.index(), place, "{kernel:?}");
    }
    assert_eq!(Kernel::all().count(), DECODE_KERNELS + TILES.len() + 3);
}

/// Each `extern "C"` name in the sources belongs to one kernel and dtype, according to the macros
/// that generate the names.
#[test]
fn names_are_those_of_the_contract() {
    let dtypes = [DType::F32, DType::BF16, DType::F16, DType::F64];
    let has = |name: &str| {
        Kernel::all().any(|kernel| dtypes.iter().any(|&t| kernel.has(t) && kernel.name(t) == name))
    };
    for name in [
        "gate_up_mma_bf16_n1_w8",
        "linear_mma_f16_n4_w16",
        "gate_up_fma_f32_n2",
        "linear_fma_bf16",
        "gate_up_sm90_f16_c1_w80",
        "gate_up_sm90_bf16_c2_w128",
        "gate_forward_f64",
        "gate_backward_f32",
        "bias_rows_f16",
    ] {
        assert!(has(name), "{name}");
    }
    for name in
        ["bias_rows_f64", "linear_fma_bf16_n1", "gate_up_mma_f32_n1_w8", "gate_up_sm90_f32_c1_w64"]
    {
        assert!(!has(name), "{name}");
    }
    let count = |t| Kernel::all().filter(|kernel| kernel.has(t)).count();
    assert_eq!(dtypes.map(count), [2 * 3 + 3, 2 * 7 + 8 + 3, 2 * 7 + 8 + 3, 2]);
}

#[test]
fn decode_takes_tensor_cores_where_it_can() {
    for (m, rows) in [
        (1, DecodeRows::Eight),
        (8, DecodeRows::Eight),
        (9, DecodeRows::Sixteen),
        (17, DecodeRows::ThirtyTwo),
    ] {
        for (gated, tiles) in [(true, 100), (false, 50)] {
            let expected = Kernel::Decode { gated, cores: Cores::Tensor16, rows };
            assert_eq!(
                decode(gated, DType::BF16, m, 800, true, 132),
                (expected, Grid::new(tiles, 512))
            );
            let expected = Kernel::Decode { gated, cores: Cores::Cuda, rows };
            let blocks = if gated { 100 } else { 200 };
            assert_eq!(
                decode(gated, DType::F32, m, 800, true, 132),
                (expected, Grid::new(blocks, 128))
            );
            let expected =
                Kernel::Decode { gated, cores: Cores::Cuda, rows: DecodeRows::ThirtyTwo };
            assert_eq!(
                decode(gated, DType::F16, m, 800, false, 132),
                (expected, Grid::new(blocks, 128))
            );
        }
    }
    let many = Kernel::Decode { gated: true, cores: Cores::Tensor8, rows: DecodeRows::Eight };
    assert_eq!(decode(true, DType::F16, 1, 14336, true, 132), (many, Grid::new(264, 256)));
}

#[test]
fn chunks_cover_all_rows_within_the_bound() {
    for (m, i, element) in [
        (33, 14336, 2),
        (4096, 14336, 2),
        (40_000, 14336, 2),
        (100_000, 28672, 4),
        (1000, 1 << 28, 2),
        (5, 1, 4),
    ] {
        let rows = chunk_rows(m, i, element);
        assert!(rows > 0 && rows.is_multiple_of(128));
        assert!(rows == 128 || rows * 3 * i * element <= SCRATCH_BYTES, "{m} {i}: {rows}");
        let sizes: Vec<usize> = (0..m).step_by(rows).map(|start| rows.min(m - start)).collect();
        assert_eq!(sizes.iter().sum::<usize>(), m);
    }
    assert_eq!(chunk_rows(4096, 14336, 2), 4096); // 4096 · 3 · 14336 · 2 B = 336 MiB
}

#[test]
fn fused_blocks_fit_the_device() {
    for (m, i) in [(1, 8), (128, 128), (129, 128), (256, 14336), (4096, 28672)] {
        for sms in [1, 2, 108, 132] {
            let grid = fused_grid(m, i, sms);
            let Tile { cluster, width, .. } = TILES[grid.tile];
            assert!(grid.blocks >= cluster && grid.blocks.is_multiple_of(cluster));
            assert!(grid.blocks <= sms.max(cluster));
            let tiles = m.div_ceil(128 * cluster) * i.div_ceil(width);
            assert!(grid.waves * grid.blocks / cluster >= tiles);
        }
    }
    // 16 clusters of rows by 112 columns of tiles on 66 clusters: 27.2 tiles each, so 28 waves.
    assert_eq!(fused_grid(4096, 14336, 132), FusedGrid { tile: 7, blocks: 132, waves: 28 });
}

/// These widths leave few multiprocessors idle where 128 leaves many idle.
#[test]
fn tiles_divide_the_features() {
    let found = |m, i| {
        let grid = fused_grid(m, i, 132);
        (TILES[grid.tile].cluster, TILES[grid.tile].width, grid.waves)
    };
    assert_eq!(found(64, 14336), (1, 112, 1)); // 128 tiles
    assert_eq!(found(64, 8192), (1, 64, 1)); // 128 tiles
    assert_eq!(found(64, 28672), (1, 112, 2)); // 256 tiles
    assert_eq!(found(512, 14336), (2, 112, 4)); // 256 clusters on 66
    assert_eq!(found(512, 8192), (2, 128, 2));
}

#[test]
fn decode_blocks_fill_the_device() {
    for (tiles, blocks, warps) in
        [(1, 1, 16), (128, 128, 16), (132, 132, 16), (133, 133, 8), (256, 256, 8), (3584, 264, 8)]
    {
        assert_eq!(decode_grid(tiles, 132), DecodeGrid { blocks, warps }, "{tiles} tiles");
    }
}

fn gpu(bytes_per_clock: f64) -> Gpu {
    Gpu { sms: 132, bytes_per_clock, hopper: true }
}

#[test]
fn blocks_that_fill_the_device_are_fused() {
    for m in [17, 64, 128, 160, 512, 2048, 4096] {
        for i in [8192, 14336, 28672] {
            assert_eq!(prefill((m, i), &gpu(12.8)), Prefill::Fused, "M = {m}, I = {i}");
            let on_h200 = if m <= 64 { Prefill::Cublas } else { Prefill::Fused };
            assert_eq!(prefill((m, i), &gpu(18.4)), on_h200, "M = {m}, I = {i}");
        }
    }
    assert_eq!(
        prefill((129, 128), &gpu(12.8)),
        Prefill::Cublas,
        "two tiles on 132 multiprocessors"
    );
    assert_eq!(prefill((64, 1376), &gpu(12.8)), Prefill::Cublas, "22 tiles");
    assert_eq!(
        prefill((300, 14336), &gpu(12.8)),
        Prefill::Cublas,
        "three rows of tiles for the work of 2.3"
    );
}

#[test]
fn a_way_can_be_forced() -> Result<()> {
    for way in [Some(Prefill::Fused), Some(Prefill::Cublas)] {
        force_prefill(way);
        assert_eq!(forced()?, way);
    }
    force_prefill(None);
    assert_eq!((parse(None), parse(Some("fused"))), (Ok(None), Ok(Some(Prefill::Fused))));
    assert!(
        parse(Some("fast"))
            .is_err_and(|error| error.contains("expected fused or cublas, found fast"))
    );
    Ok(())
}

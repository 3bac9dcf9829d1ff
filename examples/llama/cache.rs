//! State that is kept from one forward to the next: keys and values of every layer, and the rotary
//! tables.

use candle_core::{DType, Device, Result, Tensor, bail};

use super::config::LlamaConfig;
use super::rope::Frequencies;

/// The state of one text (or one batch of them) between calls of [`super::Llama::forward`].
#[derive(Debug)]
pub struct Cache {
    /// Positions whose keys and values are stored.
    len: usize,
    max_len: usize,
    /// The config field from which `max_len` was read.
    context_field: &'static str,
    frequencies: Frequencies,
    tables: Option<Tables>,
    /// The tokens of the text (B,len), kept if the rotary frequencies depend on its length.
    tokens: Option<Tensor>,
    /// One per layer. Empty when every forward computes the whole text.
    layers: Vec<KvCache>,
    use_kv_cache: bool,
}

impl Cache {
    /// An empty cache. Without `use_kv_cache` every forward must receive the whole text, from
    /// position 0.
    pub fn new(use_kv_cache: bool, cfg: &LlamaConfig) -> Self {
        Self {
            len: 0,
            max_len: cfg.max_position_embeddings,
            context_field: cfg.context_field,
            frequencies: Frequencies::new(&cfg.rope),
            tables: None,
            tokens: None,
            layers: (0..cfg.num_hidden_layers).map(|_| KvCache::default()).collect(),
            use_kv_cache,
        }
    }

    /// The number of positions stored.
    pub fn positions(&self) -> usize {
        self.len
    }

    /// Removes the text from the cache.
    pub fn reset(&mut self) {
        self.len = 0;
    }

    /// Checks that `len` tokens at `index_pos` continue the text in the cache and fit into the
    /// context.
    pub(super) fn check(&self, index_pos: usize, len: usize) -> Result<()> {
        if index_pos != self.len {
            bail!(
                "index_pos: expected {}, the number of positions in the cache, found {index_pos}",
                self.len
            )
        }
        match index_pos.checked_add(len) {
            Some(end) if end <= self.max_len => Ok(()),
            _ => {
                let Self { max_len, context_field, .. } = self;
                bail!(
                    "expected at most {max_len} positions ({context_field}), found {index_pos} + {len}"
                )
            }
        }
    }

    /// The tokens to compute next in a text that continues with `tokens` (B,T). This is `tokens`,
    /// or the whole text (B,len+T) when its new length needs other rotary frequencies. In that case
    /// the cache is emptied first.
    pub(super) fn continued(&mut self, tokens: &Tensor) -> Result<Tensor> {
        if !self.use_kv_cache || !self.frequencies.depend_on_length() {
            return Ok(tokens.clone());
        }
        let text = match &self.tokens {
            Some(before) if self.len > 0 => {
                Tensor::cat(&[&before.narrow(1, 0, self.len)?, tokens], 1)?
            }
            _ => tokens.clone(),
        };
        let starts_over =
            self.frequencies.is_long(text.dim(1)?) && !self.frequencies.is_long(self.len);
        self.tokens = Some(text.clone());
        if self.len == 0 || !starts_over {
            return Ok(tokens.clone());
        }
        self.len = 0;
        Ok(text)
    }

    /// cos and sin of positions `start..start + len`: (len, pairs) each. Tables that are too short
    /// are computed again at twice the length.
    pub(super) fn tables(
        &mut self,
        (start, len): (usize, usize),
        model_dtype: DType,
        dtype: DType,
        device: &Device,
    ) -> Result<(Tensor, Tensor)> {
        let end = start + len;
        let is_long = self.frequencies.is_long(end);
        let Tables { cos, sin, .. } = match self.tables.take() {
            Some(tables) if tables.fit(end, is_long, dtype)? => self.tables.insert(tables),
            _ => {
                let len = if self.use_kv_cache { capacity(end, self.max_len) } else { end };
                let (cos, sin) =
                    self.frequencies.tables(is_long, len, model_dtype, dtype, device)?;
                self.tables.insert(Tables { is_long, cos, sin })
            }
        };
        Ok((cos.narrow(0, start, len)?, sin.narrow(0, start, len)?))
    }

    /// The cache of layer `i`, if keys and values are kept.
    pub(super) fn layer(&mut self, i: usize) -> Option<KvSlot<'_>> {
        let (len, max_len) = (self.len, self.max_len);
        let layer = self.layers.get_mut(i).filter(|_| self.use_kv_cache)?;
        Some(KvSlot { layer, len, max_len })
    }

    /// Records that every layer has appended `len` positions.
    pub(super) fn advance(&mut self, len: usize) {
        if self.use_kv_cache {
            self.len += len;
        }
    }
}

/// cos and sin of the positions from 0 on.
#[derive(Debug)]
struct Tables {
    /// Whether the tables have the frequencies of long texts.
    is_long: bool,
    cos: Tensor,
    sin: Tensor,
}

impl Tables {
    fn fit(&self, end: usize, is_long: bool, dtype: DType) -> Result<bool> {
        Ok(self.is_long == is_long && self.cos.dtype() == dtype && self.cos.dim(0)? >= end)
    }
}

/// Keys and values of one layer: two (B,KV,capacity,D) buffers, whose first positions are in use.
#[derive(Debug, Default)]
struct KvCache(Option<(Tensor, Tensor)>);

/// The buffers of one layer, and the number of positions in use.
pub(super) struct KvSlot<'a> {
    layer: &'a mut KvCache,
    len: usize,
    max_len: usize,
}

impl KvSlot<'_> {
    /// k, v (B,KV,T,D) -> all keys and values so far, (B,KV,len+T,D), as views of the buffers.
    pub(super) fn append(self, k: &Tensor, v: &Tensor) -> Result<(Tensor, Tensor)> {
        let end = self.len + k.dim(2)?;
        let batch = k.dim(0)?;
        let (keys, values) = match &self.layer.0 {
            Some((keys, _)) if self.len > 0 && keys.dim(0)? != batch => {
                bail!(
                    "tokens: expected a batch of {}, as in the cache, found {batch}",
                    keys.dim(0)?
                )
            }
            Some((keys, values)) if self.len > 0 => (
                grown(keys, self.len, end, self.max_len)?,
                grown(values, self.len, end, self.max_len)?,
            ),
            _ => (
                empty_like(k, capacity(end, self.max_len))?,
                empty_like(v, capacity(end, self.max_len))?,
            ),
        };
        keys.slice_set(&k.contiguous()?, 2, self.len)?;
        values.slice_set(&v.contiguous()?, 2, self.len)?;
        let (keys, values) = self.layer.0.insert((keys, values));
        Ok((keys.narrow(2, 0, end)?, values.narrow(2, 0, end)?))
    }
}

/// Returns `buffer` if it has room for `end` positions, else a buffer of at least twice its size
/// with the same contents.
fn grown(buffer: &Tensor, len: usize, end: usize, max_len: usize) -> Result<Tensor> {
    if end <= buffer.dim(2)? {
        return Ok(buffer.clone());
    }
    let larger = empty_like(buffer, capacity(end, max_len))?;
    larger.slice_set(&buffer.narrow(2, 0, len)?.contiguous()?, 2, 0)?;
    Ok(larger)
}

fn empty_like(like: &Tensor, capacity: usize) -> Result<Tensor> {
    let (batch, heads, _, head_dim) = like.dims4()?;
    Tensor::zeros((batch, heads, capacity, head_dim), like.dtype(), like.device())
}

/// Capacity for `end` positions: a power of two, so that all reallocations together copy each
/// position about once.
fn capacity(end: usize, max_len: usize) -> usize {
    end.max(256).next_power_of_two().min(max_len)
}

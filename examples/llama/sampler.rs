//! The sampler: chooses the next token from the logits of the last position.

use anyhow::{Context, Result, ensure};
use candle_core::{D, DType, Device, Tensor};
use candle_nn::ops::softmax_last_dim;
use rand::SeedableRng;
use rand::distr::Distribution;
use rand::distr::weighted::WeightedIndex;
use rand::rngs::StdRng;

/// Below this temperature the division of the logits overflows, and the likeliest token is chosen.
const GREEDY_BELOW: f64 = 1e-7;

/// How the next token is chosen.
#[derive(Debug, Clone)]
pub struct SamplingArgs {
    /// Divides the logits before softmax. 0 chooses the likeliest token (greedy decoding).
    pub temperature: f64,
    /// Samples from the smallest set of tokens whose probabilities sum to at least this value.
    pub top_p: Option<f64>,
    /// Samples from this number of likeliest tokens.
    pub top_k: Option<usize>,
    /// The seed of the random numbers.
    pub seed: u64,
    /// Divides the positive logits of recent tokens and multiplies the negative ones. 1 disables
    /// the penalty.
    pub repeat_penalty: f32,
    /// The number of tokens that count as recent.
    pub repeat_last_n: usize,
}

/// Chooses tokens. The sequence of choices depends only on the seed and the logits.
pub struct Sampler {
    args: SamplingArgs,
    random: StdRng,
}

impl Sampler {
    pub fn new(args: &SamplingArgs) -> Self {
        Self { args: args.clone(), random: StdRng::seed_from_u64(args.seed) }
    }

    /// The next token after `tokens`, from the logits (1,vocab), on any device.
    ///
    /// # Errors
    /// Logits that are NaN, or infinite where they become probabilities.
    pub fn choose(&mut self, logits: &Tensor, tokens: &[u32]) -> Result<u32> {
        let mut logits = logits.squeeze(0)?.to_dtype(DType::F32)?.to_vec1::<f32>()?;
        ensure!(
            !logits.iter().any(|logit| logit.is_nan()),
            "the model's logits are not numbers: the weights are broken, or too large for the dtype"
        );
        let recent = &tokens[tokens.len().saturating_sub(self.args.repeat_last_n)..];
        penalize(&mut logits, recent, self.args.repeat_penalty);
        let vocab = logits.len();
        let logits = Tensor::from_vec(logits, vocab, &Device::Cpu)?;
        if self.args.temperature < GREEDY_BELOW {
            return Ok(logits.argmax(D::Minus1)?.to_scalar()?);
        }
        let probabilities =
            softmax_last_dim(&(logits / self.args.temperature)?)?.to_vec1::<f32>()?;
        let candidates = self.args.candidates(&probabilities);
        let weights = WeightedIndex::new(candidates.iter().map(|&token| probabilities[token]));
        Ok(candidates[weights.context("cannot sample a token")?.sample(&mut self.random)] as u32)
    }
}

impl SamplingArgs {
    /// The tokens that may be chosen, in the order of the vocabulary.
    fn candidates(&self, probabilities: &[f32]) -> Vec<usize> {
        let mut tokens: Vec<usize> = (0..probabilities.len()).collect();
        let likelier =
            |&a: &usize, &b: &usize| probabilities[b].total_cmp(&probabilities[a]).then(a.cmp(&b));
        if let Some(k) = self.top_k.filter(|&k| k < tokens.len()) {
            tokens.select_nth_unstable_by(k, likelier);
            tokens.truncate(k);
        }
        if let Some(p) = self.top_p.filter(|&p| p < 1.0) {
            tokens.sort_unstable_by(likelier);
            let sums = tokens.iter().scan(0f32, |sum, &token| {
                *sum += probabilities[token];
                Some(*sum)
            });
            let below = sums.take_while(|&sum| sum < p as f32).count();
            tokens.truncate(below + 1);
        }
        tokens.sort_unstable();
        tokens
    }
}

/// Makes each token of `recent` less likely, once even if it occurs several times.
fn penalize(logits: &mut [f32], recent: &[u32], penalty: f32) {
    if penalty == 1.0 {
        return;
    }
    let mut recent = recent.to_vec();
    recent.sort_unstable();
    recent.dedup();
    for token in recent {
        if let Some(logit) = logits.get_mut(token as usize) {
            *logit = if *logit >= 0.0 { *logit / penalty } else { *logit * penalty };
        }
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;

    const GREEDY: SamplingArgs = SamplingArgs {
        temperature: 0.0,
        top_p: None,
        top_k: None,
        seed: 0,
        repeat_penalty: 1.0,
        repeat_last_n: 64,
    };

    /// Their softmax is 0.1, 0.4, 0.2 and 0.3.
    fn logits() -> Tensor {
        Tensor::new(&[[0.1f32.ln(), 0.4f32.ln(), 0.2f32.ln(), 0.3f32.ln()]], &Device::Cpu).unwrap()
    }

    /// How often each of the four tokens is chosen in `draws` draws.
    fn counts(args: &SamplingArgs, draws: usize) -> [usize; 4] {
        let (mut sampler, mut counts) = (Sampler::new(args), [0; 4]);
        for _ in 0..draws {
            counts[sampler.choose(&logits(), &[]).unwrap() as usize] += 1;
        }
        counts
    }

    #[test]
    fn greedy_is_the_first_of_the_largest() {
        assert_eq!(counts(&GREEDY, 3), [0, 3, 0, 0]);
        assert_eq!(counts(&SamplingArgs { temperature: 1e-300, ..GREEDY }, 3), [0, 3, 0, 0]);
        assert_eq!(
            counts(&SamplingArgs { temperature: 1.0, top_k: Some(1), ..GREEDY }, 3),
            [0, 3, 0, 0]
        );
        let equal = Tensor::new(&[[1f32, 2.0, 2.0]], &Device::Cpu).unwrap();
        assert_eq!(Sampler::new(&GREEDY).choose(&equal, &[]).unwrap(), 1);
    }

    /// Frequencies of 10,000 draws are within 0.025, five standard deviations, of the
    /// probabilities.
    #[test]
    fn frequencies_are_the_probabilities() {
        let squares = [0.01, 0.16, 0.04, 0.09].map(|square| square / 0.3);
        let cases = [
            (SamplingArgs { temperature: 1.0, ..GREEDY }, [0.1, 0.4, 0.2, 0.3]),
            (SamplingArgs { temperature: 0.5, ..GREEDY }, squares),
            (
                SamplingArgs { temperature: 1.0, top_k: Some(2), ..GREEDY },
                [0.0, 4.0 / 7.0, 0.0, 3.0 / 7.0],
            ),
            (
                SamplingArgs { temperature: 1.0, top_p: Some(0.8), ..GREEDY },
                [0.0, 4.0 / 9.0, 2.0 / 9.0, 3.0 / 9.0],
            ),
        ];
        for (args, expected) in cases {
            let found = counts(&args, 10_000).map(|count| count as f64 / 1e4);
            for (found, expected) in found.iter().zip(expected) {
                assert!((found - expected).abs() < 0.025, "{args:?}: {found} for {expected}");
                assert_eq!(*found == 0.0, expected == 0.0, "{args:?}");
            }
        }
    }

    #[test]
    fn which_tokens_may_be_chosen() {
        let candidates = |top_k, top_p| {
            SamplingArgs { top_k, top_p, ..GREEDY }.candidates(&[0.1, 0.4, 0.2, 0.3])
        };
        assert_eq!(candidates(None, None), [0, 1, 2, 3]);
        assert_eq!(candidates(Some(3), None), [1, 2, 3]);
        assert_eq!(candidates(Some(9), None), [0, 1, 2, 3]);
        assert_eq!(candidates(None, Some(1e-9)), [1], "at least one token");
        assert_eq!(candidates(None, Some(0.4)), [1]);
        assert_eq!(candidates(None, Some(0.41)), [1, 3]);
        assert_eq!(candidates(None, Some(1.0)), [0, 1, 2, 3]);
        // The probabilities are those before top-k.
        assert_eq!(candidates(Some(2), Some(0.5)), [1, 3]);
        assert_eq!(candidates(Some(2), Some(0.3)), [1]);
        // Of equal ones the first.
        assert_eq!(
            SamplingArgs { top_k: Some(2), ..GREEDY }.candidates(&[0.2, 0.3, 0.2, 0.3, 0.2]),
            [1, 3]
        );
        assert_eq!(
            SamplingArgs { top_k: Some(3), ..GREEDY }.candidates(&[0.2, 0.3, 0.2, 0.3, 0.2]),
            [0, 1, 3]
        );
    }

    #[test]
    fn recent_tokens_are_less_likely() {
        let penalized = |recent: &[u32], penalty| {
            let mut logits = [2f32, -2.0, 0.0, 4.0];
            penalize(&mut logits, recent, penalty);
            logits
        };
        assert_eq!(penalized(&[0, 1, 2, 0, 0, 9], 2.0), [1.0, -4.0, 0.0, 4.0]);
        assert_eq!(penalized(&[0, 1], 1.0), [2.0, -2.0, 0.0, 4.0]);
        let choose = |repeat_last_n| {
            let args = SamplingArgs { repeat_penalty: 10.0, repeat_last_n, ..GREEDY };
            let logits = Tensor::new(&[[1f32, 3.0, 2.0]], &Device::Cpu).unwrap();
            Sampler::new(&args).choose(&logits, &[1, 2]).unwrap()
        };
        assert_eq!([choose(0), choose(1), choose(2), choose(9)], [1, 1, 0, 0]);
    }

    #[test]
    fn a_seed_gives_one_sequence() {
        let drawn = |seed| {
            let mut sampler = Sampler::new(&SamplingArgs { temperature: 1.0, seed, ..GREEDY });
            (0..20).map(|_| sampler.choose(&logits(), &[]).unwrap()).collect::<Vec<_>>()
        };
        assert_eq!(drawn(1), drawn(1));
        assert_ne!(drawn(1), drawn(2));
    }

    #[test]
    fn logits_that_are_no_numbers_are_errors() {
        let choose = |temperature, logit: f32| {
            let logits = Tensor::new(&[[0f32, logit]], &Device::Cpu).unwrap();
            Sampler::new(&SamplingArgs { temperature, ..GREEDY })
                .choose(&logits, &[])
                .map_err(|error| error.to_string())
        };
        assert!(choose(0.0, f32::NAN).unwrap_err().contains("not numbers"));
        assert_eq!(choose(0.0, f32::INFINITY), Ok(1));
        assert!(choose(1.0, f32::INFINITY).unwrap_err().contains("cannot sample"));
    }
}

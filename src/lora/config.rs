//! Which modules of a model have an adapter, with which rank and scale.

use serde_json::Value;

use super::{json, pattern};
use crate::error::{Error, Result};

/// A set of modules: the form of `target_modules` and `exclude_modules`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Modules {
    /// `"all-linear"`: every linear layer but the output head.
    AllLinear,
    /// A regular expression that the whole name must match.
    Regex(String),
    /// Names. A module is in the set if its name is one of them, or ends in a dot and one of them.
    Names(Vec<String>),
}

/// The fields of PEFT's `adapter_config.json` that change a result, named as there.
///
/// Regular expressions have the syntax of the crate fancy-regex, which is that of Python's `re` for
/// everything that PEFT's documentation uses, lookaround and backreferences included.
///
/// ```
/// use candle_swiglu::LoraConfig;
/// let config = LoraConfig::new(8, 16.0)
///     .with_target_modules(["gate_proj", "down_proj"])
///     .with_rank_pattern([(r"layers\.0\.mlp\.down_proj", 4)]);
/// assert!(config.targets("model.layers.0.mlp.down_proj")?);
/// assert!(!config.targets("model.layers.0.mlp.up_proj")?);
/// assert_eq!(config.rank("model.layers.0.mlp.down_proj")?, 4);
/// assert_eq!(config.scaling("model.layers.0.mlp.down_proj")?, 16.0 / 4.0);
/// # Ok::<(), candle_swiglu::Error>(())
/// ```
#[derive(Clone, Debug, PartialEq)]
#[non_exhaustive]
pub struct LoraConfig {
    /// The rank of modules that no key of `rank_pattern` matches.
    pub r: usize,
    /// The alpha of modules that no key of `alpha_pattern` matches.
    pub lora_alpha: f64,
    /// The scale is alpha/√r instead of alpha/r.
    pub use_rslora: bool,
    /// The probability of dropping an element of x before A in training.
    pub lora_dropout: f64,
    /// Ranks of modules; the first key that matches counts. A key is a regular expression that the
    /// whole name must match, or the part of the name after a dot.
    pub rank_pattern: Vec<(String, usize)>,
    /// Alphas of modules, as `rank_pattern`.
    pub alpha_pattern: Vec<(String, f64)>,
    /// The modules with an adapter.
    pub target_modules: Option<Modules>,
    /// Modules without one.
    pub exclude_modules: Option<Modules>,
    /// The layers whose modules have an adapter; empty for all. Not for a module whose whole name
    /// is in `target_modules`.
    pub layers_to_transform: Vec<usize>,
    /// Regular expressions of the name before a layer's number; empty for any name.
    pub layers_pattern: Vec<String>,
    /// Where the base model is from.
    pub base_model_name_or_path: Option<String>,
    /// The revision of the base model.
    pub revision: Option<String>,
    /// PEFT's name of the task, for example `CAUSAL_LM`.
    pub task_type: Option<String>,
}

impl LoraConfig {
    /// A config of this rank and alpha, without target modules.
    pub fn new(r: usize, lora_alpha: f64) -> Self {
        Self {
            r,
            lora_alpha,
            use_rslora: false,
            lora_dropout: 0.0,
            rank_pattern: vec![],
            alpha_pattern: vec![],
            target_modules: None,
            exclude_modules: None,
            layers_to_transform: vec![],
            layers_pattern: vec![],
            base_model_name_or_path: None,
            revision: None,
            task_type: None,
        }
    }

    /// Sets the scale to alpha/√r.
    pub fn with_rslora(self) -> Self {
        Self { use_rslora: true, ..self }
    }

    /// Sets the dropout of training.
    pub fn with_dropout(self, lora_dropout: f64) -> Self {
        Self { lora_dropout, ..self }
    }

    /// Sets the names of the modules with an adapter.
    pub fn with_target_modules<S: Into<String>>(self, names: impl IntoIterator<Item = S>) -> Self {
        let names = names.into_iter().map(Into::into).collect();
        Self { target_modules: Some(Modules::Names(names)), ..self }
    }

    /// Sets the ranks of modules.
    pub fn with_rank_pattern<S: Into<String>>(
        self,
        ranks: impl IntoIterator<Item = (S, usize)>,
    ) -> Self {
        let rank_pattern = ranks.into_iter().map(|(key, r)| (key.into(), r)).collect();
        Self { rank_pattern, ..self }
    }

    /// Sets the alphas of modules.
    pub fn with_alpha_pattern<S: Into<String>>(
        self,
        alphas: impl IntoIterator<Item = (S, f64)>,
    ) -> Self {
        let alpha_pattern = alphas.into_iter().map(|(key, alpha)| (key.into(), alpha)).collect();
        Self { alpha_pattern, ..self }
    }

    /// Reads an `adapter_config.json` with the defaults of PEFT.
    ///
    /// The keys of `rank_pattern` and `alpha_pattern` have the order of the [`Value`], which sorts
    /// them unless the feature `preserve_order` of serde_json is active. PEFT writes them sorted.
    ///
    /// # Errors
    /// A field of another type or range; a field, known or unknown, that changes the result in a
    /// way that this crate does not compute ([`Error::Unsupported`]): DoRA and other variants,
    /// biases, modules that are saved whole, initialisations that change the base weights.
    pub fn from_json(json: &Value) -> Result<Self> {
        json::read(json)
    }

    /// The config as PEFT reads it.
    pub fn to_json(&self) -> Value {
        json::write(self)
    }

    /// The rank r of a module, by the rules of PEFT: the first key of `rank_pattern` that matches,
    /// otherwise `r`.
    ///
    /// # Errors
    /// A key that is not a regular expression.
    pub fn rank(&self, module: &str) -> Result<usize> {
        Ok(*pattern::find("rank_pattern", &self.rank_pattern, module)?.unwrap_or(&self.r))
    }

    /// The scale s of a module: alpha/r, or alpha/√r with `use_rslora`.
    ///
    /// # Errors
    /// A key of `rank_pattern` or `alpha_pattern` that is not a regular expression.
    pub fn scaling(&self, module: &str) -> Result<f64> {
        let found = pattern::find("alpha_pattern", &self.alpha_pattern, module)?;
        let (alpha, r) = (found.unwrap_or(&self.lora_alpha), self.rank(module)? as f64);
        Ok(alpha / if self.use_rslora { r.sqrt() } else { r })
    }

    /// The linear layer of this name has an adapter, by the rules of PEFT.
    ///
    /// With `all-linear` the last part of an output head's name must be `lm_head` or `embed_out`,
    /// and for the task `SEQ_CLS` the whole name `score` or `classifier`.
    ///
    /// # Errors
    /// No `target_modules`, because PEFT's default depends on the model type; a pattern that is not
    /// a regular expression.
    pub fn targets(&self, module: &str) -> Result<bool> {
        let targets =
            self.target_modules.as_ref().ok_or(Error::MissingField { field: "target_modules" })?;
        if let Some(excluded) = &self.exclude_modules
            && self.contains("exclude_modules", excluded, module)?
        {
            return Ok(false);
        }
        match targets {
            // PEFT looks at the layers only where a name is shortened.
            Modules::Names(names) if !names.iter().any(|name| name == module) => {
                Ok(ends_in_any(module, names) && self.in_a_layer(module)?)
            }
            _ => self.contains("target_modules", targets, module),
        }
    }

    fn contains(&self, field: &str, modules: &Modules, module: &str) -> Result<bool> {
        match modules {
            Modules::AllLinear => Ok(!self.is_head(module)),
            Modules::Regex(regex) => pattern::matches_whole(field, regex, module),
            Modules::Names(names) => {
                Ok(names.iter().any(|name| name == module) || ends_in_any(module, names))
            }
        }
    }

    fn is_head(&self, module: &str) -> bool {
        let last = module.rsplit('.').next().unwrap_or(module);
        let classifies = self.task_type.as_deref() == Some("SEQ_CLS");
        ["lm_head", "embed_out"].contains(&last)
            || (classifies && ["score", "classifier"].contains(&module))
    }

    fn in_a_layer(&self, module: &str) -> Result<bool> {
        if self.layers_to_transform.is_empty() {
            return Ok(true);
        }
        let layer = pattern::layer(&self.layers_pattern, module)?;
        Ok(layer.is_some_and(|layer| self.layers_to_transform.contains(&layer)))
    }

    /// # Errors
    /// A size, a number or a regular expression that PEFT would refuse.
    pub(crate) fn validate(&self) -> Result<()> {
        let ranks = self.rank_pattern.iter().map(|(_, r)| *r);
        if ranks.chain([self.r]).any(|r| r == 0) {
            return Err(Error::ZeroSize { name: "r (or a rank of rank_pattern)" });
        }
        let invalid = |field: &str, expected, found: f64| Error::InvalidField {
            field: field.to_string(),
            expected,
            found: found.to_string(),
        };
        if !(0.0..=1.0).contains(&self.lora_dropout) {
            return Err(invalid("lora_dropout", "a number from 0 to 1", self.lora_dropout));
        }
        let alphas = self.alpha_pattern.iter().map(|(_, alpha)| *alpha);
        if let Some(alpha) = alphas.chain([self.lora_alpha]).find(|alpha| !alpha.is_finite()) {
            return Err(invalid("lora_alpha (or alpha_pattern)", "a finite number", alpha));
        }
        self.validate_patterns()
    }

    /// Every regular expression is applied once.
    fn validate_patterns(&self) -> Result<()> {
        const NO_MODULE: &str = "";
        self.scaling(NO_MODULE)?;
        pattern::layer(&self.layers_pattern, NO_MODULE)?;
        for (field, modules) in
            [("target_modules", &self.target_modules), ("exclude_modules", &self.exclude_modules)]
        {
            if let Some(modules) = modules {
                self.contains(field, modules, NO_MODULE)?;
            }
        }
        Ok(())
    }
}

/// The name ends in a dot and one of the names.
fn ends_in_any(module: &str, names: &[String]) -> bool {
    let ends_in =
        |name: &String| module.strip_suffix(name.as_str()).is_some_and(|rest| rest.ends_with('.'));
    names.iter().any(ends_in)
}

//! Tables as csv files. No value contains a comma or a quote.

use std::fmt::Display;
use std::path::Path;

use anyhow::{Context, Result, ensure};

use crate::files;

/// The rows of a csv file, under the names of its columns.
#[derive(Debug, Default, PartialEq)]
pub(crate) struct Table {
    columns: Vec<String>,
    rows: Vec<Vec<String>>,
}

/// One row of a [`Table`].
#[derive(Clone, Copy, Debug)]
pub(crate) struct Row<'a> {
    columns: &'a [String],
    values: &'a [String],
}

impl Table {
    pub(crate) fn new(columns: &[&str]) -> Self {
        Self { columns: columns.iter().map(ToString::to_string).collect(), rows: vec![] }
    }

    /// Adds a row with one value for each column.
    pub(crate) fn push(&mut self, values: &[&dyn Display]) -> Result<()> {
        ensure!(
            values.len() == self.columns.len(),
            "row: expected {} values, found {}",
            self.columns.len(),
            values.len()
        );
        self.rows.push(values.iter().map(ToString::to_string).collect());
        Ok(())
    }

    /// Adds the rows of a table with the same columns.
    pub(crate) fn append(&mut self, other: Self) -> Result<()> {
        if self.columns.is_empty() {
            self.columns.clone_from(&other.columns);
        }
        ensure!(
            self.columns == other.columns,
            "columns: expected {:?}, found {:?}",
            self.columns,
            other.columns
        );
        self.rows.extend(other.rows);
        Ok(())
    }

    pub(crate) fn rows(&self) -> impl Iterator<Item = Row<'_>> {
        self.rows.iter().map(|values| Row { columns: &self.columns, values })
    }

    pub(crate) fn write(&self, path: &Path) -> Result<()> {
        let lines = std::iter::once(&self.columns).chain(&self.rows);
        files::write(path, &lines.map(|values| values.join(",") + "\n").collect::<String>())
    }

    /// # Errors
    /// A file that cannot be read, is empty, or has a row without a value for each column.
    pub(crate) fn read(path: &Path) -> Result<Self> {
        let text = std::fs::read_to_string(path).with_context(|| path.display().to_string())?;
        let split = |line: &str| line.split(',').map(str::to_string).collect::<Vec<_>>();
        let mut lines = text.lines().map(split);
        let columns =
            lines.next().with_context(|| format!("{}: no line of columns", path.display()))?;
        let rows: Vec<_> = lines.collect();
        if let Some(line) = rows.iter().position(|row| row.len() != columns.len()) {
            anyhow::bail!(
                "{}, line {}: expected {} values, found {}",
                path.display(),
                line + 2,
                columns.len(),
                rows[line].len()
            );
        }
        Ok(Self { columns, rows })
    }
}

impl<'a> Row<'a> {
    /// # Errors
    /// A column that the table does not have.
    pub(crate) fn text(&self, column: &str) -> Result<&'a str> {
        let at = self.columns.iter().position(|name| name == column);
        at.and_then(|at| self.values.get(at))
            .map(String::as_str)
            .with_context(|| format!("column {column}: not in {:?}", self.columns))
    }

    /// # Errors
    /// A column that the table does not have, a value that is not a number.
    pub(crate) fn number(&self, column: &str) -> Result<f64> {
        let text = self.text(column)?;
        text.parse().with_context(|| format!("column {column}: expected a number, found {text}"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_written_table_is_read_back() -> Result<()> {
        let dir = tempfile::tempdir()?;
        let path = dir.path().join("table.csv");
        let mut table = Table::new(&["variant", "loss"]);
        table.push(&[&"ReLU", &0.1])?;
        assert!(table.push(&[&"GELU"]).is_err());
        table.write(&path)?;
        let read = Table::read(&path)?;
        assert_eq!(read, table);
        let row = read.rows().next().context("a row")?;
        assert_eq!((row.text("variant")?, row.number("loss")?), ("ReLU", 0.1));
        assert!(row.number("variant").is_err() && row.text("seed").is_err());
        Ok(())
    }
}

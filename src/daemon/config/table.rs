//! A table of a config document, read key by key.
//!
//! Each key is taken once, with its type; what is left at the end is unknown and noted. Errors and
//! notes carry the full path of a key and never a value: a value may be a secret.

use std::path::PathBuf;

use serde_json::{Map, Value};

use super::ConfigError;

/// What was in the document and has no effect, as `key: reason` lines for the log.
pub(super) type Notes = Vec<String>;

/// One table (JSON object) and where it is.
pub(super) struct Table {
    /// Path of the table in the document, empty for the document itself.
    path: String,
    map: Map<String, Value>,
}

/// What a key may hold.
pub(super) trait FromValue: Sized {
    /// For messages: `a string`.
    const WANTED: &'static str;
    fn from_value(value: Value) -> Option<Self>;
}

impl FromValue for bool {
    const WANTED: &'static str = "true or false";
    fn from_value(value: Value) -> Option<Self> {
        value.as_bool()
    }
}

impl FromValue for u64 {
    const WANTED: &'static str = "a whole number, 0 or more";
    fn from_value(value: Value) -> Option<Self> {
        value.as_u64()
    }
}

impl FromValue for String {
    const WANTED: &'static str = "a string";
    fn from_value(value: Value) -> Option<Self> {
        match value {
            Value::String(text) => Some(text),
            _ => None,
        }
    }
}

impl FromValue for Vec<String> {
    const WANTED: &'static str = "a list of strings";
    fn from_value(value: Value) -> Option<Self> {
        match value {
            Value::Array(items) => items.into_iter().map(String::from_value).collect(),
            _ => None,
        }
    }
}

impl FromValue for Vec<Value> {
    const WANTED: &'static str = "a list";
    fn from_value(value: Value) -> Option<Self> {
        match value {
            Value::Array(items) => Some(items),
            _ => None,
        }
    }
}

impl FromValue for Map<String, Value> {
    const WANTED: &'static str = "a table";
    fn from_value(value: Value) -> Option<Self> {
        match value {
            Value::Object(map) => Some(map),
            _ => None,
        }
    }
}

impl Table {
    /// The whole document.
    pub(super) fn document(map: Map<String, Value>) -> Self {
        Table { path: String::new(), map }
    }

    /// Full path of `key`, which lies in this table.
    pub(super) fn path_of(&self, key: &str) -> String {
        if self.path.is_empty() { key.to_owned() } else { format!("{}.{key}", self.path) }
    }

    /// An error about `key`.
    pub(super) fn error(&self, key: &str, reason: impl Into<String>) -> ConfigError {
        ConfigError::Key { path: self.path_of(key), reason: reason.into() }
    }

    /// Takes `key`; null counts as absent.
    pub(super) fn take<T: FromValue>(&mut self, key: &str) -> Result<Option<T>, ConfigError> {
        match self.map.remove(key) {
            None | Some(Value::Null) => Ok(None),
            Some(value) => {
                let found = kind(&value);
                let wrong = || self.error(key, format!("wants {}, has {found}", T::WANTED));
                T::from_value(value).map(Some).ok_or_else(wrong)
            }
        }
    }

    /// Takes the table at `key`.
    pub(super) fn table(&mut self, key: &str) -> Result<Option<Table>, ConfigError> {
        let path = self.path_of(key);
        Ok(self.take(key)?.map(|map| Table { path, map }))
    }

    /// Takes a text; an empty one counts as absent, as programs write every key they know.
    pub(super) fn text(&mut self, key: &str) -> Result<Option<String>, ConfigError> {
        Ok(self.take::<String>(key)?.filter(|text| !text.is_empty()))
    }

    /// Takes a path; an empty one counts as absent.
    pub(super) fn path(&mut self, key: &str) -> Result<Option<PathBuf>, ConfigError> {
        Ok(self.text(key)?.map(PathBuf::from))
    }

    /// Takes the list of tables at `key`, which may be absent.
    pub(super) fn tables(&mut self, key: &str) -> Result<Vec<Table>, ConfigError> {
        let list = self.take::<Vec<Value>>(key)?.unwrap_or_default();
        let tables = list.into_iter().enumerate().map(|(number, value)| {
            let path = format!("{}[{number}]", self.path_of(key));
            match value {
                Value::Object(map) => Ok(Table { path, map }),
                _ => Err(ConfigError::Key { path, reason: "wants a table".into() }),
            }
        });
        tables.collect()
    }

    /// An error about the table as a whole.
    pub(super) fn whole(&self, reason: impl Into<String>) -> ConfigError {
        ConfigError::Key { path: self.path.clone(), reason: reason.into() }
    }

    /// Takes `key`, which has no effect here, and notes `reason` if it asks for more than `default`.
    ///
    /// Programs write every key they know, so a key that is there has not been chosen by anyone.
    pub(super) fn ignore<T: FromValue + PartialEq>(
        &mut self,
        key: &str,
        default: T,
        reason: &str,
        notes: &mut Notes,
    ) -> Result<(), ConfigError> {
        if self.take::<T>(key)?.is_some_and(|value| value != default) {
            notes.push(format!("{}: {reason}", self.path_of(key)));
        }
        Ok(())
    }

    /// Notes the keys that nobody took.
    pub(super) fn finish(self, notes: &mut Notes) {
        for key in self.map.keys() {
            notes.push(format!("{}: unknown key", self.path_of(key)));
        }
    }
}

fn kind(value: &Value) -> &'static str {
    match value {
        Value::Null => "null",
        Value::Bool(_) => "true or false",
        Value::Number(_) => "a number",
        Value::String(_) => "a string",
        Value::Array(_) => "a list",
        Value::Object(_) => "a table",
    }
}

//! What a comparison found: by rule, as a table and as JSON.
//!
//! The JSON is described in `docs/check.md`; a field is never renamed or given another meaning
//! without a new `schema` number. Memory: the differences up to the limit; the others are counted.

use std::io::{self, Write};

use comfy_table::{Table, presets};
use indicatif::HumanBytes;
use serde::ser::SerializeMap;
use serde::{Serialize, Serializer};

use crate::build::image_file::{base64, printable};

/// Version of the JSON.
const SCHEMA: u32 = 1;
/// Most characters of a value in the table.
const CELL_MAX: usize = 72;

/// The three rules.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub(super) enum Rule {
    #[serde(rename = "manifest")]
    Manifest,
    #[serde(rename = "bootstrap")]
    Bootstrap,
    #[serde(rename = "file system")]
    FileSystem,
}

impl Rule {
    const ALL: [Rule; 3] = [Rule::Manifest, Rule::Bootstrap, Rule::FileSystem];

    fn name(self) -> &'static str {
        match self {
            Rule::Manifest => "manifest",
            Rule::Bootstrap => "bootstrap",
            Rule::FileSystem => "file system",
        }
    }

    /// What the two values of a difference are called.
    fn sides(self) -> [&'static str; 2] {
        match self {
            Rule::Bootstrap => ["EXPECTED", "FOUND"],
            _ => ["SOURCE", "TARGET"],
        }
    }
}

/// One side of a difference.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Value {
    /// There is none.
    Absent,
    Text(String),
    /// Bytes of the image, such as a link's target: may be anything.
    Bytes(Vec<u8>),
}

impl<T: Into<String>> From<T> for Value {
    fn from(text: T) -> Self {
        Value::Text(text.into())
    }
}

/// Where source and target are not the same.
#[derive(Clone, Debug)]
pub(super) struct Difference {
    /// Platform of the image, of an index with several.
    pub image: Option<String>,
    /// Path in the file system, or place in a manifest or a bootstrap.
    pub path: Vec<u8>,
    pub field: String,
    /// Where in the field, for a person.
    pub detail: Option<String>,
    pub source: Value,
    pub target: Value,
}

/// How a rule came out.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Outcome {
    Same,
    Different,
    /// Something could not be looked at, and nothing that could be differs.
    NotTold,
    /// A side has nothing that the rule is about.
    NotApplicable,
}

impl Outcome {
    fn name(self) -> &'static str {
        match self {
            Outcome::Same => "same",
            Outcome::Different => "different",
            Outcome::NotTold => "could not tell",
            Outcome::NotApplicable => "not applicable",
        }
    }

    pub(super) fn exit_code(self) -> u8 {
        match self {
            Outcome::Same | Outcome::NotApplicable => 0,
            Outcome::Different => 1,
            Outcome::NotTold => 2,
        }
    }
}

/// What one rule found.
#[derive(Debug)]
struct RuleReport {
    rule: Rule,
    differences: Vec<Difference>,
    count: u64,
    /// Why something could not be looked at.
    not_told: Vec<String>,
    applicable: bool,
}

/// How much was looked at.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub(super) struct Counts {
    /// Images compared: one, or one for each platform of an index.
    pub images: u64,
    /// Paths of the source's file systems.
    pub paths: u64,
    /// Layers of the source, and bytes of them as stored.
    pub source_layers: u64,
    pub source_bytes: u64,
    /// Bytes of all files in these layers.
    pub content_bytes: u64,
    /// Blobs of the target whose chunks were verified, and bytes of them as stored.
    pub target_blobs: u64,
    pub target_bytes: u64,
    pub chunks: u64,
}

/// All that was found.
#[derive(Debug)]
pub(super) struct Report {
    source: String,
    target: String,
    limit: usize,
    rules: [RuleReport; 3],
    pub counts: Counts,
    /// Platform that what is reported now is about.
    image: Option<String>,
}

impl Report {
    /// `limit`: differences of each rule that are kept; the others are counted.
    pub(super) fn new(source: String, target: String, limit: usize) -> Report {
        let rules = Rule::ALL.map(|rule| RuleReport {
            rule,
            differences: Vec::new(),
            count: 0,
            not_told: Vec::new(),
            applicable: true,
        });
        Report { source, target, limit, rules, counts: Counts::default(), image: None }
    }

    /// The platform that is reported on now.
    pub(super) fn image(&self) -> Option<&str> {
        self.image.as_deref()
    }

    /// Counts differences that nobody kept.
    pub(super) fn hidden(&mut self, rule: Rule, count: u64) {
        self.rules[rule as usize].count += count;
    }

    /// There is nothing that `rule` could be applied to.
    pub(super) fn not_applicable(&mut self, rule: Rule) {
        self.rules[rule as usize].applicable = false;
    }

    /// What is reported from now on is about the image of this platform.
    pub(super) fn begin_image(&mut self, platform: Option<String>) {
        self.image = platform;
    }

    pub(super) fn difference(
        &mut self,
        rule: Rule,
        path: impl Into<Vec<u8>>,
        field: impl Into<String>,
        source: impl Into<Value>,
        target: impl Into<Value>,
    ) {
        let report = &mut self.rules[rule as usize];
        report.count += 1;
        if report.differences.len() < self.limit {
            report.differences.push(Difference {
                image: self.image.clone(),
                path: path.into(),
                field: field.into(),
                detail: None,
                source: source.into(),
                target: target.into(),
            });
        }
    }

    /// Adds to the difference reported last, of `rule`, where in its field it is.
    pub(super) fn detail(&mut self, rule: Rule, detail: String) {
        let report = &mut self.rules[rule as usize];
        if report.count == report.differences.len() as u64
            && let Some(last) = report.differences.last_mut()
        {
            last.detail = Some(detail);
        }
    }

    /// Reports a difference if the two values are not the same.
    pub(super) fn compare(
        &mut self,
        rule: Rule,
        path: &str,
        field: &str,
        source: impl Into<Value>,
        target: impl Into<Value>,
    ) {
        let (source, target) = (source.into(), target.into());
        if source != target {
            self.difference(rule, path, field, source, target);
        }
    }

    /// Something that `rule` is about could not be looked at.
    pub(super) fn not_told(&mut self, rule: Rule, what: impl Into<String>) {
        let what = match &self.image {
            Some(image) => format!("{image}: {}", what.into()),
            None => what.into(),
        };
        let not_told = &mut self.rules[rule as usize].not_told;
        if !not_told.contains(&what) {
            not_told.push(what);
        }
    }

    #[cfg(test)]
    pub(super) fn differences(&self, rule: Rule) -> &[Difference] {
        &self.rules[rule as usize].differences
    }

    #[cfg(test)]
    pub(super) fn reasons(&self, rule: Rule) -> &[String] {
        &self.rules[rule as usize].not_told
    }

    pub(super) fn rule_outcome(&self, rule: Rule) -> Outcome {
        self.rules[rule as usize].outcome()
    }

    /// Different if any rule is, else untold if any rule is.
    pub(super) fn outcome(&self) -> Outcome {
        let outcomes = Rule::ALL.map(|rule| self.rule_outcome(rule));
        [Outcome::Different, Outcome::NotTold]
            .into_iter()
            .find(|outcome| outcomes.contains(outcome))
            .unwrap_or(Outcome::Same)
    }

    pub(super) fn print_json(&self, out: &mut impl Write) -> io::Result<()> {
        let json = ReportJson {
            schema: SCHEMA,
            source: &self.source,
            target: &self.target,
            result: self.outcome().name(),
            rules: self.rules.iter().map(RuleReport::json).collect(),
            counts: self.counts,
        };
        serde_json::to_writer_pretty(&mut *out, &json)?;
        writeln!(out)
    }

    pub(super) fn print_table(&self, out: &mut impl Write) -> io::Result<()> {
        writeln!(out, "source  {}\ntarget  {}\n", self.source, self.target)?;
        for report in &self.rules {
            writeln!(out, "{:<12}  {}", report.rule.name(), report.summary())?;
        }
        for report in &self.rules {
            report.print_table(out)?;
        }
        let counts = &self.counts;
        let layers = match counts.source_layers {
            0 => String::new(),
            layers => {
                let bytes = HumanBytes(counts.source_bytes);
                format!(" in {} ({bytes})", counted(layers, "layer"))
            }
        };
        writeln!(
            out,
            "\n{}: {}{layers}, {} in {} ({})",
            self.outcome().name(),
            counted(counts.paths, "path"),
            counted(counts.chunks, "chunk"),
            counted(counts.target_blobs, "blob"),
            HumanBytes(counts.target_bytes),
        )
    }
}

impl RuleReport {
    fn outcome(&self) -> Outcome {
        match (self.count, self.not_told.len()) {
            (0, 0) if !self.applicable => Outcome::NotApplicable,
            (0, 0) => Outcome::Same,
            (0, _) => Outcome::NotTold,
            _ => Outcome::Different,
        }
    }

    fn summary(&self) -> String {
        match self.outcome() {
            Outcome::Different => format!("different, {}", counted(self.count, "difference")),
            outcome => outcome.name().to_owned(),
        }
    }

    fn json(&self) -> RuleJson<'_> {
        RuleJson {
            rule: self.rule,
            result: self.outcome().name(),
            difference_count: self.count,
            differences: &self.differences,
            not_told: &self.not_told,
        }
    }

    fn print_table(&self, out: &mut impl Write) -> io::Result<()> {
        if self.count == 0 && self.not_told.is_empty() {
            return Ok(());
        }
        writeln!(out, "\n{}:", self.rule.name())?;
        if !self.differences.is_empty() {
            let with_image = self.differences.iter().any(|d| d.image.is_some());
            let [source, target] = self.rule.sides();
            let mut table = Table::new();
            table.load_style(presets::NOTHING);
            let head = ["PLATFORM", "PATH", "FIELD", source, target];
            let skip = usize::from(!with_image);
            table.set_header(head.into_iter().skip(skip));
            for difference in &self.differences {
                let cells = [
                    difference.image.clone().unwrap_or_default(),
                    printable(&difference.path),
                    match &difference.detail {
                        Some(detail) => format!("{} ({detail})", difference.field),
                        None => difference.field.clone(),
                    },
                    difference.source.cell(),
                    difference.target.cell(),
                ];
                table.add_row(cells.into_iter().skip(skip));
            }
            for column in table.column_iter_mut() {
                column.set_padding((0, 2));
            }
            for line in table.lines() {
                writeln!(out, "  {}", line.trim_end())?;
            }
        }
        let hidden = self.count - self.differences.len() as u64;
        if hidden > 0 {
            writeln!(out, "  and {}, see --max-problems", counted(hidden, "other"))?;
        }
        for what in &self.not_told {
            writeln!(out, "  could not tell: {what}")?;
        }
        Ok(())
    }
}

/// The object that is printed.
#[derive(Serialize)]
struct ReportJson<'a> {
    schema: u32,
    source: &'a str,
    target: &'a str,
    result: &'static str,
    rules: Vec<RuleJson<'a>>,
    counts: Counts,
}

#[derive(Serialize)]
struct RuleJson<'a> {
    rule: Rule,
    result: &'static str,
    difference_count: u64,
    differences: &'a [Difference],
    not_told: &'a [String],
}

impl Serialize for Difference {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let mut map = serializer.serialize_map(None)?;
        if let Some(image) = &self.image {
            map.serialize_entry("platform", image)?;
        }
        let path = Value::Bytes(self.path.clone());
        path.entry("path", &mut map)?;
        map.serialize_entry("field", &self.field)?;
        if let Some(detail) = &self.detail {
            map.serialize_entry("detail", detail)?;
        }
        self.source.entry("source", &mut map)?;
        self.target.entry("target", &mut map)?;
        map.end()
    }
}

impl Value {
    /// Adds this value as `key`, or as `key_b64` if it is not UTF-8.
    fn entry<M: SerializeMap>(&self, key: &str, map: &mut M) -> Result<(), M::Error> {
        let text = match self {
            Value::Absent => None,
            Value::Text(text) => Some(text.as_str()),
            Value::Bytes(bytes) => match std::str::from_utf8(bytes) {
                Ok(text) => Some(text),
                Err(_) => return map.serialize_entry(&format!("{key}_b64"), &base64(bytes)),
            },
        };
        map.serialize_entry(key, &text)
    }

    fn cell(&self) -> String {
        let (text, len) = match self {
            Value::Absent => return "absent".to_owned(),
            Value::Text(text) => (printable(text.as_bytes()), text.len()),
            Value::Bytes(bytes) => (format!("\"{}\"", printable(bytes)), bytes.len()),
        };
        if text.chars().count() <= CELL_MAX {
            return text;
        }
        let start: String = text.chars().take(CELL_MAX - 24).collect();
        format!("{start}… ({len} bytes)")
    }
}

/// `1 path`, `2 paths`.
pub(super) fn counted(count: u64, what: &str) -> String {
    let plural = if count == 1 { "" } else { "s" };
    format!("{count} {what}{plural}")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn report() -> Report {
        let mut report = Report::new("oci:a:1".into(), "oci:b:2".into(), 3);
        report.begin_image(Some("linux/arm64".into()));
        let fs = Rule::FileSystem;
        report.difference(fs, b"/etc/motd".to_vec(), "mode", "0644", "0600");
        report.difference(
            fs,
            b"/a\n\xff".to_vec(),
            "target",
            Value::Bytes(b"x\xfe".to_vec()),
            Value::Absent,
        );
        report.difference(fs, "/big", "content", "blake3:00", "blake3:01");
        report.detail(fs, "chunk 1 of 7".into());
        report.difference(fs, "/one/too/many", "uid", "0", "1");
        report.detail(fs, "of nothing that is kept".into());
        report.not_told(fs, "a reason");
        report.not_told(fs, "a reason");
        report.begin_image(None);
        report.compare(Rule::Bootstrap, "super block", "paths", "3", "3");
        report.not_told(Rule::Bootstrap, "unreachable");
        report.counts =
            Counts { paths: 4, source_layers: 1, source_bytes: 2048, ..Counts::default() };
        report
    }

    #[test]
    fn the_table() {
        let mut out = Vec::new();
        report().print_table(&mut out).unwrap();
        let want = r#"source  oci:a:1
target  oci:b:2

manifest      same
bootstrap     could not tell
file system   different, 4 differences

bootstrap:
  could not tell: unreachable

file system:
  PLATFORM     PATH       FIELD                   SOURCE     TARGET
  linux/arm64  /etc/motd  mode                    0644       0600
  linux/arm64  /a\n\xff   target                  "x\xfe"    absent
  linux/arm64  /big       content (chunk 1 of 7)  blake3:00  blake3:01
  and 1 other, see --max-problems
  could not tell: linux/arm64: a reason

different: 4 paths in 1 layer (2.00 KiB), 0 chunks in 0 blobs (0 B)
"#;
        assert_eq!(String::from_utf8(out).unwrap(), want);
    }

    #[test]
    fn the_json() {
        let mut out = Vec::new();
        report().print_json(&mut out).unwrap();
        let got: serde_json::Value = serde_json::from_slice(&out).unwrap();
        let want = serde_json::json!({
            "schema": 1, "source": "oci:a:1", "target": "oci:b:2", "result": "different",
            "rules": [
                {"rule": "manifest", "result": "same", "difference_count": 0, "differences": [], "not_told": []},
                {"rule": "bootstrap", "result": "could not tell", "difference_count": 0, "differences": [],
                 "not_told": ["unreachable"]},
                {"rule": "file system", "result": "different", "difference_count": 4, "differences": [
                    {"platform": "linux/arm64", "path": "/etc/motd", "field": "mode", "source": "0644", "target": "0600"},
                    {"platform": "linux/arm64", "path_b64": "L2EK/w==", "field": "target", "source_b64": "eP4=",
                     "target": null},
                    {"platform": "linux/arm64", "path": "/big", "field": "content", "detail": "chunk 1 of 7",
                     "source": "blake3:00", "target": "blake3:01"},
                ], "not_told": ["linux/arm64: a reason"]},
            ],
            "counts": {"images": 0, "paths": 4, "source_layers": 1, "source_bytes": 2048, "content_bytes": 0,
                       "target_blobs": 0, "target_bytes": 0, "chunks": 0},
        });
        assert_eq!(got, want);
        // The order of fields is that of the documentation.
        assert!(out.starts_with(b"{\n  \"schema\": 1,\n  \"source\""));
    }

    #[test]
    fn the_worst_outcome_is_the_exit_code() {
        let mut report = Report::new(String::new(), String::new(), 0);
        report.not_applicable(Rule::Manifest);
        assert_eq!(report.outcome().exit_code(), 0);
        report.not_told(Rule::Bootstrap, "why");
        assert_eq!(report.outcome().exit_code(), 2);
        report.difference(Rule::FileSystem, "/", "mode", "1", "2");
        assert_eq!(report.outcome().exit_code(), 1);
        assert_eq!(report.rule_outcome(Rule::Manifest), Outcome::NotApplicable);
    }
}

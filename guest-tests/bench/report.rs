//! Runs contenders in turns, and writes down what came out.

use std::fmt::Write;

use anyhow::{Context, Result, ensure};
use comfy_table::{CellAlignment, Table, presets::ASCII_MARKDOWN};

/// What one run measured: name with unit, and value.
pub type Measures = Vec<(&'static str, f64)>;

/// Something that can be measured again and again. `None`: it can not do this at all.
pub struct Contender<'a> {
    pub name: String,
    pub run: Box<dyn FnMut() -> Result<Option<Measures>> + 'a>,
}

impl<'a> Contender<'a> {
    pub fn new(
        name: impl Into<String>,
        run: impl FnMut() -> Result<Option<Measures>> + 'a,
    ) -> Contender<'a> {
        Contender { name: name.into(), run: Box::new(run) }
    }
}

/// All runs of one contender.
#[derive(Clone, Debug)]
pub struct Series {
    pub contender: String,
    pub runs: Vec<Measures>,
}

/// Median, least and greatest value.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Spread {
    pub median: f64,
    pub low: f64,
    pub high: f64,
}

impl Series {
    /// `None` if no run measured this.
    pub fn spread(&self, column: &str) -> Option<Spread> {
        let value = |run: &Measures| run.iter().find(|m| m.0 == column).map(|m| m.1);
        let mut values: Vec<f64> = self.runs.iter().filter_map(value).collect();
        values.sort_by(f64::total_cmp);
        let (low, high) = (*values.first()?, *values.last()?);
        let middle = values.len() / 2;
        let median = if values.len() % 2 == 1 {
            values[middle]
        } else {
            (values[middle - 1] + values[middle]) / 2.0
        };
        Some(Spread { median, low, high })
    }

    pub fn median(&self, column: &str) -> Option<f64> {
        self.spread(column).map(|spread| spread.median)
    }
}

/// Runs all contenders, alternating, so that a change of the machine's mood hits all of them.
pub fn alternate(mut contenders: Vec<Contender<'_>>, runs: usize) -> Result<Vec<Series>> {
    ensure!(runs > 0, "nothing to do");
    let mut all: Vec<Series> = contenders
        .iter()
        .map(|contender| Series { contender: contender.name.clone(), runs: Vec::new() })
        .collect();
    for run in 0..runs {
        for (contender, series) in contenders.iter_mut().zip(&mut all) {
            let measures = (contender.run)();
            let measures = measures.with_context(|| format!("{}, run {run}", contender.name))?;
            series.runs.extend(measures);
        }
    }
    Ok(all)
}

/// Three digits that count, with commas between thousands.
pub fn show(value: f64) -> String {
    if value.is_infinite() {
        return "∞".into();
    }
    let digits = match value.abs() {
        100.0.. => 0,
        10.0.. => 1,
        1.0.. => 2,
        _ => 3,
    };
    let text = format!("{value:.digits$}");
    let (whole, rest) = text.split_at(text.find('.').unwrap_or(text.len()));
    let mut out = String::new();
    for (at, digit) in whole.char_indices() {
        if at > 0 && (whole.len() - at) % 3 == 0 && !whole[..at].ends_with('-') {
            out.push(',');
        }
        out.push(digit);
    }
    out + rest
}

/// A table whose cells are text already.
pub fn by_rows(header: Vec<String>, rows: Vec<Vec<String>>) -> String {
    let mut table = Table::new();
    table.load_style(ASCII_MARKDOWN);
    table.set_header(header);
    table.add_rows(rows);
    for column in table.column_iter_mut().skip(1) {
        column.set_cell_alignment(CellAlignment::Right);
    }
    table.to_string()
}

/// A row for each contender, a column for each measure: median and, in brackets, the least and greatest value.
pub fn by_measure(first: &str, all: &[Series]) -> String {
    let mut columns: Vec<&str> = Vec::new();
    for (name, _) in all.iter().flat_map(|series| series.runs.first()).flatten() {
        if !columns.contains(name) {
            columns.push(name);
        }
    }
    let row = |series: &Series| {
        let cell = |column: &&str| match series.spread(column) {
            Some(Spread { median, low, high }) if low == high => show(median),
            Some(Spread { median, low, high }) => {
                format!("{} ({}–{})", show(median), show(low), show(high))
            }
            None => "—".into(),
        };
        let cells = columns.iter().map(cell);
        std::iter::once(series.contender.clone()).chain(cells).collect()
    };
    let header = std::iter::once(first).chain(columns.iter().copied()).map(str::to_owned);
    by_rows(header.collect(), all.iter().map(row).collect())
}

/// One workload with one set of parameters.
#[derive(Clone, Debug)]
pub struct Case {
    pub name: String,
    pub all: Vec<Series>,
}

impl Case {
    pub fn median(&self, contender: &str, column: &str) -> Option<f64> {
        self.all.iter().find(|series| series.contender == contender)?.median(column)
    }

    /// The best median of those that are neither ours nor a limit.
    pub fn best_peer(&self, column: &str, more_is_better: bool) -> Option<f64> {
        let peers = self.all.iter().filter(|series| is_peer(&series.contender));
        let medians = peers.filter_map(|series| series.median(column));
        if more_is_better { medians.reduce(f64::max) } else { medians.reduce(f64::min) }
    }
}

/// Name of our daemon in tables, and how those of limits begin.
pub const OURS: &str = "rafsd";
const LIMIT: &str = "limit: ";
pub const LIMIT_PREADV: &str = "limit: preadv";
pub const LIMIT_COPY: &str = "limit: copy of mapped pages";
pub const LIMIT_FILES: &str = "limit: open, pread, close";
pub const LIMIT_ROUND_TRIP: &str = "limit: eventfd round trip";

fn is_peer(contender: &str) -> bool {
    !contender.starts_with(OURS) && !contender.starts_with(LIMIT)
}

/// Workloads that are measured in the same two units.
#[derive(Clone, Debug)]
pub struct Family {
    pub name: &'static str,
    /// What is measured, in a sentence or two.
    pub what: String,
    /// What counts most, and whether more of it is better.
    pub lead: (&'static str, bool),
    /// What it costs: less is better.
    pub cost: Option<&'static str>,
    pub cases: Vec<Case>,
}

impl Family {
    /// Those of which some case has the lead measure.
    pub fn contenders(&self) -> Vec<&str> {
        let mut names: Vec<&str> = Vec::new();
        let all = self.cases.iter().flat_map(|case| &case.all);
        for series in all.filter(|series| series.spread(self.lead.0).is_some()) {
            if !names.contains(&series.contender.as_str()) {
                names.push(&series.contender);
            }
        }
        names
    }

    /// A row for each case, a column for each contender: median ± half of the range, then the cost. The last columns
    /// compare ours with the best peer.
    pub fn table(&self) -> String {
        let contenders = self.contenders();
        let (lead, more) = self.lead;
        let peers = contenders.iter().any(|name| is_peer(name));
        let cell = |case: &Case, contender: &str| -> Option<String> {
            let series = case.all.iter().find(|series| series.contender == contender)?;
            let Spread { median, low, high } = series.spread(lead)?;
            let around = if median == 0.0 { 0.0 } else { 50.0 * (high - low) / median };
            let mut text = format!("{} ±{around:.0} %", show(median));
            if let Some(cost) = self.cost.and_then(|cost| series.median(cost)) {
                let _ = write!(text, " · {}", show(cost));
            }
            Some(text)
        };
        let ratio = |case: &Case, column: &str, more: bool| -> Option<String> {
            let ours = case.median(OURS, column)?;
            Some(format!("{:.2} ×", ours / case.best_peer(column, more)?))
        };
        let row = |case: &Case| {
            let mut row = vec![case.name.clone()];
            row.extend(contenders.iter().map(|name| cell(case, name).unwrap_or("—".into())));
            if peers {
                row.push(ratio(case, lead, more).unwrap_or("—".into()));
                let cost = self.cost.map(|cost| ratio(case, cost, false));
                row.extend(cost.map(|cost| cost.unwrap_or("—".into())));
            }
            row
        };
        let unit = self.cost.map_or(lead.into(), |cost| format!("{lead} · {cost}"));
        let mut header = vec![unit];
        header.extend(contenders.iter().map(|name| (*name).to_owned()));
        if peers {
            header.push(format!("{OURS} ÷ best peer"));
            header.extend(self.cost.map(|_| "its cost".to_owned()));
        }
        by_rows(header, self.cases.iter().map(row).collect())
    }

    /// The text of its section.
    pub fn section(&self) -> String {
        format!("### {}\n\n{}\n\n{}\n", self.name, self.what, self.table())
    }
}

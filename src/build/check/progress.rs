//! Bars on standard error, invisible if that is no terminal.

use indicatif::{MultiProgress, ProgressBar, ProgressStyle};

fn style(template: &str) -> ProgressStyle {
    ProgressStyle::with_template(template).expect("the template is a literal")
}

/// Counts bytes.
pub(super) fn bytes(what: String, bytes: u64) -> ProgressBar {
    ProgressBar::new(bytes)
        .with_style(style("{msg} {wide_bar} {bytes}/{total_bytes} {eta}"))
        .with_message(what)
}

/// Counts something of which the end is not known.
pub(super) fn spinner(what: &'static str) -> ProgressBar {
    ProgressBar::new_spinner().with_style(style("{msg} {pos}")).with_message(what)
}

/// Bars for work that goes on at the same time, and one for all of it.
pub(super) struct Bars {
    bars: MultiProgress,
    total: ProgressBar,
}

impl Bars {
    pub(super) fn new(what: String, total: u64) -> Bars {
        let bars = MultiProgress::new();
        let total = bars.add(bytes(what, total));
        Bars { bars, total }
    }

    /// A bar that lives as long as its work.
    pub(super) fn add(&self, what: String, len: u64) -> Bar<'_> {
        let bar = self.bars.insert_before(&self.total, bytes(what, len));
        Bar { bar, total: &self.total }
    }
}

impl Drop for Bars {
    fn drop(&mut self) {
        self.total.finish_and_clear();
    }
}

/// One piece of work.
pub(super) struct Bar<'a> {
    bar: ProgressBar,
    total: &'a ProgressBar,
}

impl Bar<'_> {
    pub(super) fn inc(&self, bytes: u64) {
        self.bar.inc(bytes);
        self.total.inc(bytes);
    }
}

impl Drop for Bar<'_> {
    fn drop(&mut self) {
        self.bar.finish_and_clear();
    }
}

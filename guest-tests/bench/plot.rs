//! Plots of the tables, as SVG.

use std::path::Path;

use anyhow::{Result, anyhow};
use plotters::prelude::*;

/// A name, and a value for each member: rows of a table.
pub type Groups = Vec<(String, Vec<(String, f64)>)>;

/// Distinguishable in print and by the colour-blind: Okabe and Ito.
const COLOURS: [RGBColor; 8] = [
    RGBColor(0, 114, 178),
    RGBColor(230, 159, 0),
    RGBColor(0, 158, 115),
    RGBColor(204, 121, 167),
    RGBColor(150, 150, 150),
    RGBColor(86, 180, 233),
    RGBColor(213, 94, 0),
    RGBColor(60, 60, 60),
];

const ROW: f64 = 16.0;
/// Pixels for names at the left, and above the names of colours.
const LEFT: f64 = 190.0;
const TOP: f64 = 44.0;
const WIDTH: f64 = 900.0;
/// Names of colours that have room beside each other.
const NAMES: usize = 4;

fn pixels(value: f64) -> i32 {
    // Coordinates of a drawing of a thousand pixels.
    #[allow(clippy::cast_possible_truncation)]
    let pixels = value.round() as i32;
    pixels
}

/// Horizontal bars: a group for each row, a bar for each member. Bars longer than `most` are cut, their value says so.
pub fn bars(path: &Path, title: &str, groups: &Groups, most: f64) -> Result<()> {
    let mut members: Vec<&str> = Vec::new();
    for (name, _) in groups.iter().flat_map(|group| &group.1) {
        if !members.contains(&name.as_str()) {
            members.push(name);
        }
    }
    let rows: usize = groups.iter().map(|group| group.1.len() + 1).sum();
    let top = TOP + members.len().div_ceil(NAMES) as f64 * ROW + 10.0;
    let height = top + rows as f64 * ROW;
    let size = (pixels(WIDTH).unsigned_abs(), pixels(height).unsigned_abs());
    let root = SVGBackend::new(path, size).into_drawing_area();
    let failed = |error: DrawingAreaErrorKind<_>| anyhow!("{}: {error}", path.display());
    root.fill(&WHITE).map_err(failed)?;
    let text = |text: &str, x: f64, y: f64, size: u32| {
        let style = ("sans-serif", size).into_text_style(&root).color(&BLACK);
        root.draw_text(text, &style, (pixels(x), pixels(y))).map_err(failed)
    };
    text(title, 10.0, 12.0, 18)?;
    for (at, member) in members.iter().enumerate() {
        let x = 10.0 + (at % NAMES) as f64 * (WIDTH - 20.0) / NAMES as f64;
        let y = TOP + (at / NAMES) as f64 * ROW;
        let square = [(pixels(x), pixels(y)), (pixels(x) + 10, pixels(y) + 10)];
        let colour = COLOURS[at % COLOURS.len()].filled();
        root.draw(&Rectangle::new(square, colour)).map_err(failed)?;
        text(member, x + 14.0, y - 1.0, 12)?;
    }
    let (mut y, scale) = (top, (WIDTH - LEFT - 60.0) / most);
    for (group, bars) in groups {
        text(group, 10.0, y + bars.len() as f64 * ROW / 2.0 - 8.0, 13)?;
        for (member, value) in bars {
            let at = members.iter().position(|name| name == member).unwrap_or(0);
            let right = LEFT + value.min(most) * scale;
            let corners = [(pixels(LEFT), pixels(y)), (pixels(right), pixels(y + ROW) - 2)];
            let colour = COLOURS[at % COLOURS.len()].filled();
            root.draw(&Rectangle::new(corners, colour)).map_err(failed)?;
            text(&super::report::show(*value), right + 4.0, y + 1.0, 12)?;
            y += ROW;
        }
        y += ROW;
    }
    root.present().map_err(failed)
}

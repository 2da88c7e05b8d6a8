//! Draws a report as SVG: for each row, operations a second on the left, server processor time on the right.

use std::fmt::Write;

use crate::measure::Figures;
use crate::report::{Report, RowReport};
use crate::rows::{Comparison, Contender};
use crate::tables::thousands;

// Everything in CSS pixels.
const WIDTH: f64 = 1000.0;
const MARGIN: f64 = 24.0;
const HEADER: f64 = 92.0;
const NAMES: f64 = 190.0;
const BAR: f64 = 14.0;
const BAR_STEP: f64 = 20.0;
const ROW_TITLE: f64 = 30.0;
const ROW_GAP: f64 = 14.0;
const LEFT: f64 = MARGIN + NAMES;
const LEFT_BARS: f64 = 320.0;
const RIGHT: f64 = 650.0;
const RIGHT_BARS: f64 = 260.0;

/// The report as an SVG document.
pub(crate) fn draw(report: &Report) -> String {
    let height = HEADER + report.rows.iter().map(row_height).sum::<f64>() + MARGIN;
    let mut svg = format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {WIDTH} {height}\" width=\"{WIDTH}\" height=\"{height}\" \
         font-family=\"system-ui, 'Segoe UI', 'DejaVu Sans', sans-serif\" font-size=\"12\">\n\
         <style>.t{{fill:#1f2933}}.q{{fill:#5b6773}}.v{{fill:#1f2933;font-variant-numeric:tabular-nums}}</style>\n\
         <rect width=\"{WIDTH}\" height=\"{height}\" fill=\"#ffffff\"/>\n"
    );
    text(
        &mut svg,
        MARGIN,
        34.0,
        "t",
        "font-size=\"19\" font-weight=\"600\"",
        report.title(),
    );
    let machine = report.machines.first();
    let way = match report.comparison {
        Comparison::Servers => "over a Unix socket",
        Comparison::Cluster => "in three copies",
    };
    let facts = format!(
        "{} cores of {}, Linux {}; {} MiB {way}; median of {} rounds of {} s; {}",
        machine.map_or(0, |machine| machine.cores),
        machine.map_or("", |machine| &machine.processor),
        machine.map_or("", |machine| &machine.kernel),
        report.effort.size_bytes >> 20,
        report.effort.rounds,
        report.effort.run_seconds,
        report.date,
    );
    text(&mut svg, MARGIN, 54.0, "q", "", &facts);
    text(
        &mut svg,
        LEFT,
        82.0,
        "q",
        "font-weight=\"600\"",
        "operations a second (longer is better)",
    );
    text(
        &mut svg,
        RIGHT,
        82.0,
        "q",
        "font-weight=\"600\"",
        "server CPU, µs an operation (shorter is better)",
    );
    let mut top = HEADER;
    for row in &report.rows {
        draw_row(&mut svg, row, top);
        top += row_height(row);
    }
    svg += "</svg>\n";
    svg
}

fn row_height(row: &RowReport) -> f64 {
    ROW_TITLE + BAR_STEP * row.medians.len() as f64 + ROW_GAP
}

fn draw_row(svg: &mut String, row: &RowReport, top: f64) {
    let largest = |pick: fn(&Figures) -> f64| {
        row.medians
            .values()
            .map(pick)
            .fold(f64::MIN_POSITIVE, f64::max)
    };
    let most = largest(|figures| figures.operations_per_second);
    let longest = largest(|figures| figures.server_cpu_us.unwrap_or(0.0));
    let _ = writeln!(
        svg,
        "<line x1=\"{MARGIN}\" x2=\"{}\" y1=\"{top}\" y2=\"{top}\" stroke=\"#e4e7eb\"/>",
        WIDTH - MARGIN
    );
    text(
        svg,
        MARGIN,
        top + 20.0,
        "t",
        "font-weight=\"600\"",
        &row.title,
    );
    let mut y = top + ROW_TITLE;
    for (contender, figures) in &row.medians {
        let baseline = y + BAR - 3.0;
        text(svg, MARGIN, baseline, "t", "", contender.title());
        bar(
            svg,
            LEFT,
            y,
            LEFT_BARS * figures.operations_per_second / most,
            *contender,
        );
        let length = LEFT_BARS * figures.operations_per_second / most;
        text(
            svg,
            LEFT + length + 6.0,
            baseline,
            "v",
            "",
            &thousands(figures.operations_per_second),
        );
        match figures.server_cpu_us {
            Some(spent) => {
                let length = RIGHT_BARS * spent / longest;
                bar(svg, RIGHT, y, length, *contender);
                text(
                    svg,
                    RIGHT + length + 6.0,
                    baseline,
                    "v",
                    "",
                    &format!("{spent:.1}"),
                );
            }
            None => text(svg, RIGHT, baseline, "q", "", "no server"),
        }
        y += BAR_STEP;
    }
}

fn bar(svg: &mut String, x: f64, y: f64, length: f64, contender: Contender) {
    // Ours stands out, the yardsticks are outlines, the peers are one grey: their names are beside them.
    let paint = match contender {
        _ if contender.is_ours() => "fill=\"#0f766e\"",
        _ if contender.is_yardstick() => "fill=\"#f1f3f5\" stroke=\"#9aa5b1\"",
        _ => "fill=\"#b8c2cc\"",
    };
    let _ = writeln!(
        svg,
        "<rect x=\"{x}\" y=\"{y:.1}\" width=\"{:.1}\" height=\"{BAR}\" rx=\"2\" {paint}/>",
        length.max(1.0)
    );
}

fn text(svg: &mut String, x: f64, y: f64, class: &str, more: &str, words: &str) {
    let words = words
        .replace('&', "&amp;")
        .replace('<', "&lt;")
        .replace('>', "&gt;");
    let _ = writeln!(
        svg,
        "<text x=\"{x:.1}\" y=\"{y:.1}\" class=\"{class}\" {more}>{words}</text>"
    );
}

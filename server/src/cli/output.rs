//! Printing: tables for people, JSON and YAML for programs.

use std::io::{self, IsTerminal, Write};

use comfy_table::{CellAlignment, Table, presets};
use serde::Serialize;

use super::{args::Format, error::CliError};

/// Something a command answers with. Its serialised form is an interface that scripts rely on; its table is not.
pub(super) trait Answer: Serialize {
    /// Writes the form for people.
    fn write_table(&self, out: &mut dyn Write) -> io::Result<()>;
}

/// Prints an answer to stdout.
pub(super) fn print(format: Format, answer: &impl Answer) -> Result<(), CliError> {
    write(format, answer, &mut io::stdout().lock()).map_err(CliError::from)
}

fn write(format: Format, answer: &impl Answer, out: &mut dyn Write) -> io::Result<()> {
    match format {
        Format::Table => answer.write_table(out)?,
        Format::Json => {
            serde_json::to_writer_pretty(&mut *out, answer)?;
            writeln!(out)?;
        }
        Format::Yaml => out.write_all(
            serde_yaml_ng::to_string(answer)
                .map_err(io::Error::other)?
                .as_bytes(),
        )?,
    }
    out.flush()
}

/// Prints one JSON or YAML document of a stream of them: JSON a line each, YAML separated by `---`.
pub(super) fn print_streamed(format: Format, document: &impl Serialize) -> Result<(), CliError> {
    let mut out = io::stdout().lock();
    match format {
        Format::Yaml => {
            let text = serde_yaml_ng::to_string(document).map_err(io::Error::other)?;
            write!(out, "---\n{text}")?;
        }
        Format::Json | Format::Table => {
            serde_json::to_writer(&mut out, document).map_err(io::Error::from)?;
            writeln!(out)?;
        }
    }
    Ok(out.flush()?)
}

/// Something worth knowing that is not the answer: goes to stderr, whatever the format.
pub(super) fn note(text: impl std::fmt::Display) {
    eprintln!("ashlar: {text}");
}

/// Whether a person is watching stderr.
pub(super) fn stderr_is_watched() -> bool {
    io::stderr().is_terminal()
}

/// Columns without lines, like those of ps. Columns named in `right` hold numbers.
pub(super) fn columns(
    header: &[&str],
    right: &[usize],
    rows: impl IntoIterator<Item = Vec<String>>,
) -> String {
    let mut table = Table::new();
    table.load_style(presets::NOTHING).force_no_tty();
    table.set_header(header.iter().copied());
    for row in rows {
        table.add_row(row);
    }
    for (index, column) in table.column_iter_mut().enumerate() {
        column.set_padding((0, 2));
        if right.contains(&index) {
            column.set_cell_alignment(CellAlignment::Right);
        }
    }
    let mut text = table.trim_fmt();
    text.push('\n');
    text
}

/// `Label:  value` lines with the values aligned.
pub(super) fn fields(fields: &[(&str, String)]) -> String {
    let width = fields
        .iter()
        .map(|(label, _)| label.len())
        .max()
        .unwrap_or(0)
        + 1;
    fields
        .iter()
        .map(|(label, value)| format!("{:width$}  {value}\n", format!("{label}:")))
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Serialize)]
    struct Sample {
        name: &'static str,
        size_bytes: u64,
    }

    impl Answer for Sample {
        fn write_table(&self, out: &mut dyn Write) -> io::Result<()> {
            let row = vec![self.name.to_owned(), self.size_bytes.to_string()];
            out.write_all(columns(&["NAME", "BYTES"], &[1], [row]).as_bytes())
        }
    }

    fn written(format: Format) -> String {
        let mut out = Vec::new();
        write(
            format,
            &Sample {
                name: "data",
                size_bytes: 4096,
            },
            &mut out,
        )
        .expect("writes to memory");
        String::from_utf8(out).expect("text")
    }

    #[test]
    fn every_format_is_written() {
        assert_eq!(written(Format::Table), "NAME  BYTES\ndata   4096\n");
        assert_eq!(
            written(Format::Json),
            "{\n  \"name\": \"data\",\n  \"size_bytes\": 4096\n}\n"
        );
        assert_eq!(written(Format::Yaml), "name: data\nsize_bytes: 4096\n");
    }

    #[test]
    fn fields_are_aligned() {
        assert_eq!(
            fields(&[("A", "1".into()), ("Long", "2".into())]),
            "A:     1\nLong:  2\n"
        );
    }
}

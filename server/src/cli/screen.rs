//! A text drawn over and over on a terminal, with plain ANSI sequences.

use std::{
    fmt::Write as _,
    io::{self, Write as _},
};

/// Enters the terminal's alternate screen and hides the cursor.
const ENTER: &str = "\x1b[?1049h\x1b[?25l";
/// Undoes [`ENTER`].
const LEAVE: &str = "\x1b[?25h\x1b[?1049l";
/// Cursor to the top left.
const HOME: &str = "\x1b[H";
/// Clears to the end of the line.
const CLEAR_LINE: &str = "\x1b[K";
/// Clears to the end of the screen.
const CLEAR_REST: &str = "\x1b[J";

/// What a terminal that does not tell its size is taken to have, as terminals had for decades.
const SIZE_UNKNOWN: (usize, usize) = (24, 80);

/// The alternate screen; left again however the program ends, short of a signal that cannot be caught.
pub(super) struct Screen(());

impl Screen {
    pub(super) fn enter() -> io::Result<Screen> {
        let mut out = io::stdout().lock();
        out.write_all(ENTER.as_bytes())?;
        out.flush()?;
        Ok(Screen(()))
    }

    /// Shows `text` in place of what was there; what does not fit is cut off.
    pub(super) fn draw(&self, text: &str) -> io::Result<()> {
        let mut out = io::stdout().lock();
        // Asked every time: the window may have been changed.
        let (rows, columns) = rustix::termios::tcgetwinsize(&out)
            .ok()
            .map(|size| (size.ws_row.into(), size.ws_col.into()))
            .filter(|(rows, columns)| *rows > 0 && *columns > 0)
            .unwrap_or(SIZE_UNKNOWN);
        out.write_all(frame(text, rows, columns).as_bytes())?;
        out.flush()
    }
}

impl Drop for Screen {
    fn drop(&mut self) {
        let mut out = io::stdout().lock();
        // The terminal may be gone, and then there is nothing to restore.
        let _ = out.write_all(LEAVE.as_bytes()).and_then(|()| out.flush());
    }
}

/// `text` cut to a screen of `rows` and `columns`. Never ends in a line break, which would scroll a full screen.
fn frame(text: &str, rows: usize, columns: usize) -> String {
    let lines: Vec<&str> = text.lines().collect();
    let shown = if lines.len() > rows {
        rows.saturating_sub(1)
    } else {
        lines.len()
    };
    let hidden = lines.len() - shown;
    let mut frame = String::from(HOME);
    for (index, line) in lines[..shown].iter().enumerate() {
        if index > 0 {
            frame.push('\n');
        }
        frame.extend(line.chars().take(columns));
        frame += CLEAR_LINE;
    }
    if hidden > 0 {
        let more = format!("{hidden} more lines; --once prints them all");
        let line_break = if shown > 0 { "\n" } else { "" };
        let _ = write!(frame, "{line_break}{more:.columns$}{CLEAR_LINE}");
    }
    frame += CLEAR_REST;
    frame
}

#[cfg(test)]
mod tests {
    use super::*;

    fn visible(text: &str, rows: usize, columns: usize) -> Vec<String> {
        let frame = frame(text, rows, columns)
            .replace(HOME, "")
            .replace(CLEAR_REST, "");
        frame
            .split('\n')
            .map(|line| line.replace(CLEAR_LINE, ""))
            .collect()
    }

    #[test]
    fn what_fits_is_shown_whole() {
        assert_eq!(visible("one\n\nthree\n", 3, 5), ["one", "", "three"]);
    }

    #[test]
    fn what_does_not_fit_is_cut_and_said() {
        assert_eq!(
            visible("one\ntwo\nthree\nfour", 3, 80),
            ["one", "two", "2 more lines; --once prints them all"]
        );
        assert_eq!(visible("one\ntwo", 1, 6), ["2 more"]);
        assert_eq!(visible("a long line", 5, 6), ["a long"]);
        assert_eq!(visible("größer", 5, 3), ["grö"]);
    }
}

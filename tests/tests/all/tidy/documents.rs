//! Links lead somewhere, and a document has one title.

use std::path::{Component, Path, PathBuf};

use super::{SourceFile, assert_tidy, files, root};

/// Lines outside fenced code blocks, with their numbers from 1.
fn prose(text: &str) -> Vec<(usize, &str)> {
    let mut fence: Option<&str> = None;
    let mut lines = Vec::new();
    for (index, line) in text.lines().enumerate() {
        let start = line.trim_start();
        let marker = ["```", "~~~"]
            .into_iter()
            .find(|marker| start.starts_with(marker));
        match (fence, marker) {
            (None, Some(marker)) => fence = Some(marker),
            (Some(open), Some(marker)) if open == marker => fence = None,
            (None, None) => lines.push((index + 1, line)),
            _ => {}
        }
    }
    lines
}

/// Takes code spans out of a line: what stands in them is no link.
fn without_code_spans(line: &str) -> String {
    line.split('`').step_by(2).collect::<Vec<_>>().join(" ")
}

/// Targets of inline links and images, `[text](target)` and `[text](target "title")`, and of definitions, `[text]: target`.
fn link_targets(line: &str) -> Vec<String> {
    let line = without_code_spans(line);
    let mut targets = Vec::new();
    let mut rest = line.as_str();
    while let Some(start) = rest.find("](") {
        rest = &rest[start + 2..];
        let Some(end) = rest.find(')') else { break };
        targets.extend(rest[..end].split_whitespace().next().map(str::to_owned));
        rest = &rest[end..];
    }
    if let Some((label, target)) = line
        .trim_start()
        .strip_prefix('[')
        .and_then(|line| line.split_once("]: "))
        && !label.contains(']')
    {
        targets.extend(target.split_whitespace().next().map(str::to_owned));
    }
    targets
}

/// The anchors of a document's headings, as the usual renderers make them.
fn anchors(text: &str) -> Vec<String> {
    let mut anchors: Vec<String> = Vec::new();
    for (_, line) in prose(text) {
        let hashes = line.chars().take_while(|c| *c == '#').count();
        if !(1..=6).contains(&hashes) || !line[hashes..].starts_with(' ') {
            continue;
        }
        let slug: String = line[hashes..]
            .trim()
            .to_lowercase()
            .chars()
            .filter(|c| c.is_alphanumeric() || matches!(c, ' ' | '-' | '_'))
            .map(|c| if c == ' ' { '-' } else { c })
            .collect();
        let earlier = anchors
            .iter()
            .filter(|a| **a == slug || a.starts_with(&format!("{slug}-")))
            .count();
        anchors.push(if earlier == 0 {
            slug
        } else {
            format!("{slug}-{earlier}")
        });
    }
    anchors
}

/// Resolves `.` and `..` without asking the file system.
fn normal(path: &Path) -> PathBuf {
    let mut out = PathBuf::new();
    for part in path.components() {
        match part {
            Component::ParentDir => {
                out.pop();
            }
            Component::CurDir => {}
            part => out.push(part),
        }
    }
    out
}

/// Complaints about the links of one document. `text_of` gives the text of a file of the tree, an empty one for a folder, and
/// `None` for what is not there.
fn link_complaints(file: &SourceFile, text_of: impl Fn(&Path) -> Option<String>) -> Vec<String> {
    let mut complaints = Vec::new();
    for (number, line) in prose(&file.text) {
        for target in link_targets(line) {
            if target.contains("://") || target.starts_with("mailto:") {
                continue;
            }
            let (path, anchor) = target
                .split_once('#')
                .map_or((target.as_str(), None), |(path, anchor)| {
                    (path, Some(anchor))
                });
            let folder = Path::new(&file.path).parent().unwrap_or(Path::new(""));
            let text = if path.is_empty() {
                Some(file.text.clone())
            } else {
                text_of(&normal(&folder.join(path)))
            };
            match (text, anchor) {
                (None, _) => {
                    complaints.push(format!("{}:{number}: {target} is not there", file.path))
                }
                (Some(text), Some(anchor)) if !anchors(&text).iter().any(|a| a == anchor) => {
                    complaints.push(format!("{}:{number}: {target}: no such heading", file.path));
                }
                _ => {}
            }
        }
    }
    complaints
}

fn title_complaints(file: &SourceFile) -> Vec<String> {
    let titles = prose(&file.text)
        .iter()
        .filter(|(_, line)| line.starts_with("# "))
        .count();
    if titles == 1 {
        Vec::new()
    } else {
        vec![format!("{}: {titles} titles instead of one", file.path)]
    }
}

#[test]
fn links_lead_somewhere() {
    let root = root();
    let text_of = |path: &Path| {
        let path = root.join(path);
        if path.is_dir() {
            Some(String::new())
        } else {
            std::fs::read_to_string(path).ok()
        }
    };
    assert_tidy(
        files(&[".md"])
            .iter()
            .flat_map(|file| link_complaints(file, text_of))
            .collect(),
    );
}

#[test]
fn every_document_has_one_title() {
    assert_tidy(files(&[".md"]).iter().flat_map(title_complaints).collect());
}

#[test]
fn broken_documents_are_seen() {
    let file = |text: &str| SourceFile {
        path: "docs/a.md".into(),
        text: text.into(),
    };
    let text_of = |path: &Path| {
        (path == Path::new("docs/b.md")).then(|| "# B\n\n## The life of a write\n".to_owned())
    };
    for good in [
        "[b](b.md)",
        "[b](./b.md#the-life-of-a-write)",
        "[b](../docs/b.md \"title\")",
        "[web](https://example.org/x)",
        "`[not a link](c.md)`",
        "```\n[not a link](c.md)\n```",
        "# Here\n[here](#here)",
        "[b]: b.md",
    ] {
        let complaints = link_complaints(&file(good), text_of);
        assert!(complaints.is_empty(), "{good}: {complaints:?}");
    }
    for bad in [
        "[c](c.md)",
        "[b](b.md#nothing)",
        "[b](b.md) [c](c.md)",
        "[here](#nowhere)",
        "[c]: c.md",
    ] {
        assert_eq!(link_complaints(&file(bad), text_of).len(), 1, "{bad}");
    }
    assert!(title_complaints(&file("# A\n\n## B\n```\n# not a title\n```\n")).is_empty());
    assert_eq!(title_complaints(&file("# A\n# B\n")).len(), 1);
    assert_eq!(title_complaints(&file("no title")).len(), 1);
    assert_eq!(anchors("# A b\n## A b\n"), ["a-b", "a-b-1"]);
}

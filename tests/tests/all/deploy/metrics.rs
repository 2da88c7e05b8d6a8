//! Alerts and dashboard use metrics that the daemon has.

use std::collections::BTreeSet;

use serde_json::Value;

use super::{array, both, objects, read};

/// Where the daemon says what it measures.
const SCRAPE: [&str; 2] = [
    "server/src/http/scrape.rs",
    "server/src/http/scrape/stores.rs",
];
const DASHBOARD: &str = "deploy/charts/ashlar/files/dashboard.json";
const ALERTS: &str = "deploy/charts/ashlar/files/alerts.yaml";

/// Names as Prometheus stores them, from the calls `page.KIND("NAME"` in the source.
fn names_in(source: &str) -> BTreeSet<String> {
    let mut names = BTreeSet::new();
    for kind in ["gauge", "counter", "histogram"] {
        let call = format!("page.{kind}(");
        for (start, _) in source.match_indices(&call) {
            let name = source[start + call.len()..]
                .split('"')
                .nth(1)
                .expect("a name");
            match kind {
                "gauge" => names.insert(name.to_owned()),
                "counter" => names.insert(format!("{name}_total")),
                _ => ["bucket", "sum", "count"]
                    .into_iter()
                    .all(|part| names.insert(format!("{name}_{part}"))),
            };
        }
    }
    names
}

/// Words of an expression that begin as our metrics do.
fn metrics_in(expression: &str) -> BTreeSet<String> {
    expression
        .split(|c: char| !c.is_ascii_alphanumeric() && c != '_')
        .filter(|word| word.starts_with("ashlar_") || word.starts_with("process_"))
        .map(str::to_owned)
        .collect()
}

/// Every expression of the dashboard, those of its variables included.
fn dashboard_expressions() -> Vec<String> {
    let board: Value = serde_json::from_str(&read(DASHBOARD)).expect("JSON");
    let panels = array(&board["panels"])
        .iter()
        .flat_map(|panel| array(&panel["targets"]))
        .map(|target| &target["expr"]);
    let variables = array(&board["templating"]["list"])
        .iter()
        .map(|variable| &variable["definition"]);
    panels
        .chain(variables)
        .filter_map(|expression| expression.as_str().map(str::to_owned))
        .collect()
}

fn alerts() -> Vec<Value> {
    array(&objects(&read(ALERTS))[0]["groups"])
        .iter()
        .flat_map(|group| array(&group["rules"]).to_vec())
        .collect()
}

#[test]
fn names_are_read_as_prometheus_stores_them() {
    let source = r#"page.gauge( "a_b", "x"); page.counter("c", "y"); page.histogram("d_seconds","#;
    let names: Vec<_> = names_in(source).into_iter().collect();
    assert_eq!(
        names,
        [
            "a_b",
            "c_total",
            "d_seconds_bucket",
            "d_seconds_count",
            "d_seconds_sum"
        ]
    );
    let used: Vec<_> = metrics_in(r#"rate(ashlar_a_total{x="ashlar-b"}[5m])"#)
        .into_iter()
        .collect();
    assert_eq!(used, ["ashlar_a_total"]);
}

#[test]
fn the_dashboard_shows_metrics_that_exist() {
    let known = names_in(&SCRAPE.map(read).concat());
    assert!(known.len() > 50, "{known:?}");
    let expressions = dashboard_expressions();
    assert!(expressions.len() > 30);
    for expression in expressions {
        let used = metrics_in(&expression);
        assert!(!used.is_empty(), "{expression}");
        let unknown: Vec<_> = used.difference(&known).collect();
        assert!(unknown.is_empty(), "{expression}: {unknown:?}");
    }
}

#[test]
fn the_dashboards_panels_have_ids_of_their_own_and_do_not_overlap() {
    let board: Value = serde_json::from_str(&read(DASHBOARD)).expect("JSON");
    let panels = array(&board["panels"]);
    let ids: BTreeSet<_> = panels.iter().map(|panel| panel["id"].as_u64()).collect();
    assert_eq!(ids.len(), panels.len());
    let mut taken = BTreeSet::new();
    for panel in panels {
        let side = |name: &str| panel["gridPos"][name].as_u64().expect("a number");
        for x in side("x")..side("x") + side("w") {
            for y in side("y")..side("y") + side("h") {
                assert!(x < 24 && taken.insert((x, y)), "{}", panel["title"]);
            }
        }
    }
}

#[test]
fn alerts_watch_metrics_that_exist_and_say_what_to_do() {
    let known = names_in(&SCRAPE.map(read).concat());
    let rules = alerts();
    assert!(rules.len() >= 10);
    for rule in rules {
        let used = metrics_in(rule["expr"].as_str().expect("an expression"));
        let unknown: Vec<_> = used.difference(&known).collect();
        assert!(
            !used.is_empty() && unknown.is_empty(),
            "{rule}: {unknown:?}"
        );
        for field in ["summary", "description"] {
            assert!(
                rule["annotations"][field]
                    .as_str()
                    .is_some_and(|text| text.len() > 10),
                "{rule}"
            );
        }
        assert!(
            ["warning", "critical"].contains(&rule["labels"]["severity"].as_str().unwrap_or("")),
            "{rule}"
        );
    }
}

#[test]
fn a_command_that_an_alert_names_is_a_label_that_exists() {
    let source = read("server/src/metrics.rs");
    for text in [read(ALERTS), dashboard_expressions().join("\n")] {
        for (start, _) in text.match_indices("command=\"") {
            let command = text[start..].split('"').nth(1).expect("a value");
            assert!(source.contains(&format!("=> \"{command}\"")), "{command}");
        }
    }
}

#[test]
fn the_chart_carries_both_unchanged() {
    let [_, (_, objects)] = both();
    let of = |kind: &str| {
        objects
            .iter()
            .find(|object| object["kind"] == kind)
            .unwrap_or_else(|| panic!("no {kind}"))
    };
    let rendered = of("ConfigMap")["data"]["ashlar.json"]
        .as_str()
        .expect("the dashboard");
    let rendered: Value = serde_json::from_str(rendered).expect("JSON");
    let file: Value = serde_json::from_str(&read(DASHBOARD)).expect("JSON");
    assert_eq!(rendered, file);
    let rules: Vec<_> = array(&of("PrometheusRule")["spec"]["groups"])
        .iter()
        .flat_map(|group| array(&group["rules"]).to_vec())
        .collect();
    assert_eq!(rules, alerts());
    // The monitor finds the service of the daemon, and its port.
    let monitor = of("ServiceMonitor");
    let service = of("Service");
    assert_eq!(
        monitor["spec"]["endpoints"][0]["port"],
        service["spec"]["ports"][0]["name"]
    );
    for (label, value) in monitor["spec"]["selector"]["matchLabels"]
        .as_object()
        .expect("labels")
    {
        assert_eq!(&service["metadata"]["labels"][label], value);
    }
}

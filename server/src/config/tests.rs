use clap::{CommandFactory, Parser};

use super::*;

/// Flags only: the variables of the person who runs the tests must not matter.
fn arguments(flags: &[&str]) -> Arguments {
    let command = Arguments::command().mut_args(|arg| arg.env(None::<&str>));
    let matches = command
        .try_get_matches_from([&["ashlard"], flags].concat())
        .expect("flags");
    clap::FromArgMatches::from_arg_matches(&matches).expect("arguments")
}

fn resolve(flags: &[&str]) -> Result<Config, ConfigError> {
    Config::resolve(&arguments(flags))
}

fn refusal(flags: &[&str]) -> String {
    resolve(flags).expect_err("should be refused").to_string()
}

#[test]
fn the_command_line_is_well_formed() {
    Arguments::command().debug_assert();
}

#[test]
fn defaults_lie_under_the_data_directory() {
    let config = resolve(&["--data-dir", "/srv/a"]).expect("config");
    assert_eq!(
        config.stores,
        [StoreSetting {
            path: "/srv/a/stores/0".into(),
            size: None
        }]
    );
    assert_eq!(config.listen_nbd, [Address::Unix("/srv/a/nbd.sock".into())]);
    assert_eq!(
        config.listen_admin,
        [Address::Unix("/srv/a/admin.sock".into())]
    );
    assert_eq!(config.listen_http.to_string(), "127.0.0.1:9460");
    assert_eq!(
        (config.data_threads, config.io_engine),
        (1, EngineChoice::Auto)
    );
}

#[test]
fn the_data_directory_has_no_default() {
    let message = refusal(&[]);
    assert!(
        message.contains("--data-dir") && message.contains("ASHLAR_DATA_DIR"),
        "{message}"
    );
}

#[test]
fn a_relative_path_is_made_absolute() {
    let config = resolve(&["--data-dir", "d"]).expect("config");
    assert!(config.data_dir.is_absolute() && config.stores[0].path.is_absolute());
}

#[test]
fn what_is_printed_means_the_same() {
    let flags = [
        "--data-dir=/d",
        "--store=/x,size=1.5GiB",
        "--store=/dev/sdb",
        "--store-size=3GiB",
        "--listen-nbd=tcp:127.0.0.1:10809",
        "--listen-nbd=unix:/run/n.sock",
        "--listen-admin=tcp:[::1]:9461",
        "--listen-admin=tcp:0.0.0.0:9462",
        "--advertise=h:9462",
        "--label=zone=a",
        "--certificate-lifetime=3600",
        "--listen-http=off",
        "--metadata=etcd:https://a:1,https://b:2",
        "--etcd-prefix=/x/",
        "--etcd-ca=/ca",
        "--etcd-cert=/cert",
        "--etcd-key=/key",
        "--log-format=json",
        "--log-level=warn,ashlar_server=debug",
        "--data-threads=2",
        "--io-engine=posix",
        "--tail-size=100MiB",
        "--tail-dir=/dev/shm",
        "--leaf-cache-size=1GiB",
        "--max-connections=5",
        "--max-connection-buffer=40MiB",
        "--max-buffer=80MiB",
        "--handshake-timeout=3",
        "--scrub-rate=1MiB",
        "--fill-rate=3MiB",
        "--replace-after=90",
        "--scrub-every=36h",
        "--drain-timeout=0",
        "--io-flusher",
        "--oom-score-adjust=-500",
        "--fault=write:nth=3,errno=EIO",
    ];
    let dir = tempfile::tempdir().expect("temporary directory");
    let file = dir.path().join("ashlard.toml");
    for flags in [&flags[..1], &flags] {
        let config = resolve(flags).expect("config");
        std::fs::write(&file, config.to_toml()).expect("write");
        assert_eq!(
            resolve(&["--config", file.to_str().expect("UTF-8")]).expect("config"),
            config
        );
    }
    let printed = resolve(&flags).expect("config").to_toml();
    for flag in flags {
        let name = flag
            .trim_start_matches('-')
            .split('=')
            .next()
            .expect("name");
        assert!(
            printed.contains(&format!("{name} = ")),
            "{name} is missing in\n{printed}"
        );
    }
}

#[test]
fn a_flag_beats_the_file() {
    let dir = tempfile::tempdir().expect("temporary directory");
    let file = dir.path().join("ashlard.toml");
    std::fs::write(
        &file,
        "data-dir = \"/file\"\nstore = [\"/a\", \"/b\"]\ntail-size = \"50MiB\"\n",
    )
    .expect("write");
    let file = file.to_str().expect("UTF-8");
    let config = resolve(&["--config", file, "--data-dir=/flag", "--store=/c"]).expect("config");
    assert_eq!(config.data_dir, Path::new("/flag"));
    assert_eq!(config.stores.len(), 1, "a list replaces a list");
    assert_eq!(config.tail_bytes, 50 << 20);
}

#[test]
fn every_setting_has_its_variable_and_its_key() {
    let command = Arguments::command();
    for argument in command
        .get_arguments()
        .filter(|a| a.get_id() != "print_config" && a.get_long() != Some("help"))
    {
        let Some(long) = argument.get_long().filter(|long| *long != "version") else {
            continue;
        };
        let variable = format!("ASHLAR_{}", long.to_uppercase().replace('-', "_"));
        assert_eq!(
            argument.get_env().and_then(|env| env.to_str()),
            Some(variable.as_str()),
            "{long}"
        );
    }
}

#[test]
fn a_variable_may_hold_a_list() {
    let arguments =
        Arguments::try_parse_from(["ashlard", "--data-dir=/d", "--store=/a;/b,size=1GiB"])
            .expect("parse");
    assert_eq!(arguments.settings.store.len(), 2);
    assert_eq!(arguments.settings.store[1].size, Some(ByteCount(1 << 30)));
}

#[test]
fn an_unknown_key_is_refused_with_its_place() {
    let dir = tempfile::tempdir().expect("temporary directory");
    let file = dir.path().join("ashlard.toml");
    std::fs::write(&file, "data-dir = \"/d\"\ntale-size = \"50MiB\"\n").expect("write");
    let message = refusal(&["--config", file.to_str().expect("UTF-8")]);
    assert!(
        message.contains("tale-size") && message.contains("line 2"),
        "{message}"
    );
    let missing = refusal(&["--config", "/nonexistent/ashlard.toml"]);
    assert!(
        missing.contains("/nonexistent/ashlard.toml") && missing.contains("cannot be read"),
        "{missing}"
    );
}

#[test]
fn what_cannot_work_is_refused_in_words() {
    let cases: &[(&[&str], &str)] = &[
        (&["--listen-nbd=tcp:0.0.0.0:10809"], "TLS"),
        (&["--listen-admin=tcp:10.0.0.1:1"], "TLS"),
        (&["--store=/a", "--store=/a"], "given twice"),
        (
            &["--listen-nbd=unix:/a", "--listen-admin=unix:/a"],
            "given twice",
        ),
        (&["--data-threads=0"], "between 1 and 256"),
        (&["--tail-size=1MiB"], "at least 8MiB"),
        (&["--max-connection-buffer=1MiB"], "at least 33MiB"),
        (&["--max-buffer=40MiB"], "at least 64MiB"),
        (&["--log-level=a=b=c"], "log-level"),
        (&["--overcommit=99"], "between 100 and 100000"),
        (&["--oom-score-adjust=2000"], "between -1000 and 1000"),
        (&["--fault=nonsense"], "fault"),
    ];
    for (flags, part) in cases {
        let message = refusal(&[&["--data-dir=/d"], *flags].concat());
        assert!(message.contains(part), "{flags:?}: {message}");
    }
    let long = format!("--data-dir=/{}", "x".repeat(120));
    assert!(
        refusal(&[&long]).contains("107"),
        "the path of the socket is too long"
    );
    for bad in [
        "--store=",
        "--store=/a,b",
        "--store=/a,size=x",
        "--listen-nbd=/a",
        "--listen-http=x",
        "--tail-size=x",
        "--scrub-every=7",
    ] {
        assert!(
            Arguments::try_parse_from(["ashlard", "--data-dir=/d", bad]).is_err(),
            "{bad}"
        );
    }
}

#[test]
fn scrubs_come_every_week_unless_somebody_says_otherwise() {
    let every = |flags: &[&str]| {
        let config = resolve(&[&["--data-dir=/d"], flags].concat()).expect("config");
        config.scrub_every
    };
    assert_eq!(every(&[]), Every::days(7));
    assert_eq!(every(&["--scrub-every=0"]), Every::Off);
    let dir = tempfile::tempdir().expect("temporary directory");
    let file = dir.path().join("ashlard.toml");
    for (text, expected) in [
        ("scrub-every = 0", Every::Off),
        ("scrub-every = \"off\"", Every::Off),
        ("scrub-every = \"2d\"", Every::days(2)),
    ] {
        std::fs::write(&file, text).expect("write");
        assert_eq!(
            every(&["--config", file.to_str().expect("UTF-8")]),
            expected
        );
    }
}

#[test]
fn http_may_be_reached_from_elsewhere_because_it_only_tells() {
    let config = resolve(&["--data-dir=/d", "--listen-http=0.0.0.0:9460"]).expect("config");
    assert_eq!(config.listen_http.to_string(), "0.0.0.0:9460");
}

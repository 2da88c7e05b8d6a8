//! Programs that others wrote, against a volume.

use std::fs;
use std::io::{Read, Seek, SeekFrom, Write};
use std::path::Path;
use std::time::Duration;

use ashlar_tests::daemon::{Daemon, Setup};
use ashlar_tests::fio::Fio;
use ashlar_tests::nbd::Wishes;
use ashlar_tests::seed::{self, Rng};
use ashlar_tests::tool::Tool;
use ashlar_tests::wait;

const MINUTES: Duration = Duration::from_secs(60);

fn serve(test: &str, size: &str) -> (Daemon, String) {
    let daemon = Setup::default().start(test);
    daemon.create("disk", size);
    let uri = daemon.uri("disk");
    (daemon, uri)
}

/// A file of `size` bytes with data, zeros written, and holes.
fn patchy_image(path: &Path, size: u64, rng: &mut Rng) {
    let mut file = fs::File::create_new(path).unwrap();
    file.set_len(size).unwrap();
    let piece = 1 << 20;
    for at in (0..size).step_by(piece) {
        file.seek(SeekFrom::Start(at)).unwrap();
        let length = (size - at).min(piece as u64) as usize;
        match rng.below(4) {
            0 => {}
            1 => file.write_all(&vec![0; length]).unwrap(),
            _ => file.write_all(&rng.bytes(length)).unwrap(),
        }
    }
}

fn assert_same(one: &Path, other: &Path) {
    let (mut one, mut other) = (fs::File::open(one).unwrap(), fs::File::open(other).unwrap());
    let size = one.metadata().unwrap().len();
    assert_eq!(size, other.metadata().unwrap().len());
    let (mut a, mut b) = (vec![0; 1 << 20], vec![0; 1 << 20]);
    for at in (0..size).step_by(1 << 20) {
        let length = (size - at).min(1 << 20) as usize;
        one.read_exact(&mut a[..length]).unwrap();
        other.read_exact(&mut b[..length]).unwrap();
        assert!(a[..length] == b[..length], "the megabyte at {at} differs");
    }
}

#[test]
fn nbdinfo_shows_every_capability() {
    let (daemon, uri) = serve("nbdinfo", "64MiB");
    let text = Tool::new("nbdinfo").args(["--json", &uri]).succeed();
    let info: serde_json::Value = serde_json::from_str(&text).unwrap();
    assert_eq!(info["protocol"], "newstyle-fixed");
    assert_eq!(info["structured"], true);
    let export = &info["exports"][0];
    let able = [
        "can_cache",
        "can_df",
        "can_fast_zero",
        "can_flush",
        "can_fua",
        "can_multi_conn",
        "can_trim",
        "can_zero",
    ];
    for capability in able {
        assert_eq!(export[capability], true, "{capability} of {export}");
    }
    assert_eq!(export["is_read_only"], false);
    assert_eq!(export["is_rotational"], false);
    assert_eq!(export["contexts"], serde_json::json!(["base:allocation"]));
    assert_eq!(export["export-size"], 64 << 20);
    for (name, size) in [
        ("block_size_minimum", 1),
        ("block_size_preferred", 4096),
        ("block_size_maximum", 32 << 20),
    ] {
        assert_eq!(export[name], size, "{name}");
    }
    for can in [
        "cache",
        "df",
        "fast-zero",
        "flush",
        "fua",
        "multi-conn",
        "trim",
        "zero",
        "write",
        "structured-reply",
    ] {
        Tool::new("nbdinfo").args(["--can", can, &uri]).succeed();
    }
    assert_eq!(
        Tool::new("nbdinfo").args(["--size", &uri]).succeed().trim(),
        (64 << 20).to_string()
    );
    daemon.create("second", "1MiB");
    let list = Tool::new("nbdinfo")
        .args(["--list", &daemon.uri("")])
        .succeed();
    assert!(
        list.contains("export=\"disk\"") && list.contains("export=\"second\""),
        "{list}"
    );
    daemon
        .open("disk", Wishes::SIMPLE)
        .write(1 << 20, &[1; 8192])
        .unwrap();
    let map = Tool::new("nbdinfo")
        .args(["--map", "--json", &uri])
        .succeed();
    let map: serde_json::Value = serde_json::from_str(&map).unwrap();
    let data: Vec<_> = map
        .as_array()
        .unwrap()
        .iter()
        .filter(|extent| extent["type"] == 0)
        .collect();
    assert_eq!(data.len(), 1, "{map}");
    assert_eq!(
        (&data[0]["offset"], &data[0]["length"]),
        (&(1 << 20).into(), &8192.into())
    );
}

#[test]
fn nbdcopy_in_and_out() {
    let (daemon, uri) = serve("nbdcopy", "192MiB");
    let mut rng = Rng::new(seed::of_run("nbdcopy"));
    let (source, target) = (daemon.scratch.join("in"), daemon.scratch.join("out"));
    patchy_image(&source, 192 << 20, &mut rng);
    let copy = || {
        Tool::new("nbdcopy")
            .args(["--connections=4", "--requests=64", "--flush"])
            .limit(2 * MINUTES)
    };
    copy().arg(&source).arg(&uri).succeed();
    copy().arg(&uri).arg(&target).succeed();
    assert_same(&source, &target);
    // What was holes there is holes here.
    let allocated =
        |path: &Path| std::os::unix::fs::MetadataExt::blocks(&fs::metadata(path).unwrap()) * 512;
    assert!(
        allocated(&target) <= allocated(&source) + (1 << 20),
        "{} bytes",
        allocated(&target)
    );
    // From one volume to another, both ours.
    daemon.create("copy", "192MiB");
    copy().arg(&uri).arg(daemon.uri("copy")).succeed();
    let compared = Tool::new("qemu-img").args([
        "compare",
        "-f",
        "raw",
        "-F",
        "raw",
        &uri,
        &daemon.uri("copy"),
    ]);
    compared.limit(2 * MINUTES).succeed();
}

#[test]
fn qemu_img_converts_compares_and_maps() {
    let (daemon, uri) = serve("qemu-img", "96MiB");
    let mut rng = Rng::new(seed::of_run("qemu-img"));
    let source = daemon.scratch.join("in");
    patchy_image(&source, 96 << 20, &mut rng);
    let source = source.to_str().unwrap();
    let img = |arguments: &[&str]| {
        Tool::new("qemu-img")
            .args(arguments)
            .limit(2 * MINUTES)
            .succeed()
    };
    img(&[
        "convert", "-n", "-W", "-m", "16", "-f", "raw", "-O", "raw", source, &uri,
    ]);
    assert!(img(&["compare", "-f", "raw", "-F", "raw", source, &uri]).contains("identical"));
    let qcow = daemon.scratch.join("out.qcow2");
    let qcow = qcow.to_str().unwrap();
    img(&["convert", "-f", "raw", "-O", "qcow2", &uri, qcow]);
    assert!(img(&["compare", "-f", "qcow2", "-F", "raw", qcow, &uri]).contains("identical"));
    let map: serde_json::Value =
        serde_json::from_str(&img(&["map", "--output=json", "-f", "raw", &uri])).unwrap();
    let map = map.as_array().unwrap();
    let covered: u64 = map
        .iter()
        .map(|extent| extent["length"].as_u64().unwrap())
        .sum();
    assert_eq!(covered, 96 << 20);
    assert!(
        map.iter().any(|extent| extent["zero"] == true)
            && map.iter().any(|extent| extent["data"] == true)
    );
}

#[test]
fn qemu_io_writes_where_it_likes() {
    let (_daemon, uri) = serve("qemu-io", "64MiB");
    let commands = [
        "write -P 0x11 0 1M",
        "write -P 0x22 4095 4098",
        "write -P 0x33 70001 1",
        "write -z 8192 16384",
        "write -z -u 200000 50001",
        "discard 524288 65536",
        "flush",
        "read -P 0x11 0 4095",
        "read -P 0x22 4095 4097",
        "read -P 0 8192 16384",
        "read -P 0x11 24576 45425",
        "read -P 0x33 70001 1",
        "read -P 0x11 70002 1000",
        "read -P 0 200000 50001",
        "read -P 0x11 250001 4095",
        "read -P 0 524288 65536",
        "aio_write -P 0x44 1M 4M",
        "aio_write -P 0x55 5M 4M",
        "aio_flush",
        "read -P 0x44 1M 4M",
        "read -P 0x55 5M 4M",
        "write -f -P 0x66 33554432 12345",
        "read -P 0x66 33554432 12345",
    ];
    let tool = commands.iter().fold(
        Tool::new("qemu-io").args(["-f", "raw", "-t", "none", &uri]),
        |tool, command| tool.args(["-c", command]),
    );
    let said = tool.succeed();
    assert!(
        !said.contains("Pattern verification failed") && !said.to_lowercase().contains("error"),
        "{said}"
    );
}

#[test]
fn nbdsh_scripts_work() {
    let (_daemon, uri) = serve("nbdsh", "64MiB");
    let script = r#"
assert h.get_size() == 64 * 1024 * 1024
assert h.can_meta_context("base:allocation")
h.pwrite(b"hello" * 1000, 1000000001 % 60000000)
assert h.pread(5000, 1000000001 % 60000000) == bytearray(b"hello" * 1000)
h.pwrite(b"x" * 65536, 0, nbd.CMD_FLAG_FUA)
h.zero(4096, 4096, nbd.CMD_FLAG_NO_HOLE)
h.trim(4096, 16384)
h.flush()
h.cache(65536, 0)
buf = h.pread(65536, 0)
assert buf[0:4096] == bytearray(b"x" * 4096)
assert buf[4096:8192] == bytearray(4096)
assert buf[16384:20480] == bytearray(4096)
extents = []
h.block_status(65536, 0, lambda context, offset, entries, err: extents.extend(entries))
assert sum(extents[0::2]) >= 65536, extents
pieces = []
def chunk(buf, offset, status, err):
    pieces.append((offset, len(buf), status))
h.pread_structured(65536, 0, chunk)
assert any(status == nbd.READ_HOLE for _, _, status in pieces), pieces
try:
    h.set_strict_mode(0)
    h.pread(512, 64 * 1024 * 1024)
    assert False, "a read past the end succeeded"
except nbd.Error as error:
    assert error.errno == "EINVAL", error.errno
"#;
    Tool::new("nbdsh")
        .args(["--base-allocation", "-u", &uri, "-c", script])
        .succeed();
}

/// What a person sees of it: a file system on a volume, over nbdfuse and a loop device (no kernel module for NBD needed).
fn file_system(test: &str, make: &[&str], check: &[&str]) {
    // xfs wants 300 MB at least.
    let (mut daemon, uri) = serve(test, "320MiB");
    let directories = ["fuse", "mnt"].map(|name| daemon.scratch.join(name));
    for directory in &directories {
        fs::create_dir(directory).unwrap();
    }
    let [fuse, mount] = directories;
    let mut rng = Rng::new(seed::of_run(test));
    let data = rng.bytes(40 << 20);
    {
        let attached = Attached::new(&fuse, &uri);
        Tool::new(make[0])
            .args(&make[1..])
            .arg(&attached.device)
            .limit(2 * MINUTES)
            .succeed();
        Tool::new("mount")
            .arg(&attached.device)
            .arg(&mount)
            .succeed();
        let mounted = Mounted(&mount);
        fs::write(mount.join("big"), &data).unwrap();
        for n in 0..500 {
            fs::write(mount.join(format!("small-{n}")), &data[n..n * 3]).unwrap();
        }
        for n in (0..500).step_by(2) {
            fs::remove_file(mount.join(format!("small-{n}"))).unwrap();
        }
        Tool::new("fstrim").arg("-v").arg(&mount).succeed();
        Tool::new("sync").arg("-f").arg(&mount).succeed();
        drop(mounted);
        Tool::new(check[0])
            .args(&check[1..])
            .arg(&attached.device)
            .limit(2 * MINUTES)
            .succeed();
    }
    daemon.kill();
    daemon.start();
    let attached = Attached::new(&fuse, &uri);
    Tool::new(check[0])
        .args(&check[1..])
        .arg(&attached.device)
        .limit(2 * MINUTES)
        .succeed();
    Tool::new("mount")
        .arg(&attached.device)
        .arg(&mount)
        .succeed();
    let mounted = Mounted(&mount);
    assert!(
        fs::read(mount.join("big")).unwrap() == data,
        "the file changed over the restart"
    );
    assert_eq!(
        fs::read_dir(&mount)
            .unwrap()
            .filter(|e| e.as_ref().unwrap().file_name() != "lost+found")
            .count(),
        251
    );
    drop(mounted);
}

/// A volume as a loop device.
struct Attached {
    device: String,
    fuse: std::path::PathBuf,
    process: Option<ashlar_tests::tool::Running>,
}

impl Attached {
    fn new(fuse: &Path, uri: &str) -> Attached {
        let process = Tool::new("nbdfuse")
            .arg(fuse)
            .arg(uri)
            .limit(MINUTES)
            .start();
        let file = fuse.join("nbd");
        wait::until(Duration::from_secs(20), "nbdfuse", || {
            fs::metadata(&file).map_err(|error| error.to_string())
        });
        let device = Tool::new("losetup")
            .args(["-f", "--show"])
            .arg(&file)
            .succeed()
            .trim()
            .to_owned();
        Attached {
            device,
            fuse: fuse.to_owned(),
            process: Some(process),
        }
    }
}

impl Drop for Attached {
    fn drop(&mut self) {
        let detached = Tool::new("losetup").args(["-d", &self.device]).run();
        let unmounted = Tool::new("fusermount3").arg("-u").arg(&self.fuse).run();
        let ended = self.process.take().expect("kept until drop");
        if std::thread::panicking() {
            ended.abandon();
        } else {
            detached.success();
            unmounted.success();
            ended.finish();
        }
    }
}

struct Mounted<'a>(&'a Path);

impl Drop for Mounted<'_> {
    fn drop(&mut self) {
        let done = Tool::new("umount").arg(self.0).run();
        if !std::thread::panicking() {
            done.success();
        }
    }
}

#[test]
fn ext4_lives_on_a_volume() {
    file_system(
        "ext4",
        &["mkfs.ext4", "-q", "-F"],
        &["fsck.ext4", "-f", "-n"],
    );
}

#[test]
fn xfs_lives_on_a_volume() {
    file_system("xfs", &["mkfs.xfs", "-q", "-f"], &["xfs_repair", "-n"]);
}

#[test]
fn fio_verifies_4k_at_depth_32() {
    let (_daemon, uri) = serve("fio-4k", "128MiB");
    Fio::verify(&uri)
        .args(["--rw=randwrite", "--bs=4k", "--iodepth=32", "--size=128m"])
        .succeed();
}

#[test]
fn fio_verifies_mixed_sizes_with_fsync() {
    let (_daemon, uri) = serve("fio-mixed", "128MiB");
    let mixed = [
        "--rw=randwrite",
        "--bsrange=512-128k",
        "--blockalign=512",
        "--iodepth=16",
        "--fsync=16",
        "--size=96m",
    ];
    Fio::verify(&uri).args(mixed).succeed();
}

#[test]
fn fio_trims_at_random() {
    let (_daemon, uri) = serve("fio-trim", "128MiB");
    let written = ["--rw=randwrite", "--bs=4k", "--iodepth=16", "--size=64m"];
    Fio::verify(&uri).args(written).succeed();
    Fio::plain(&uri)
        .args([
            "--rw=randtrim",
            "--bs=4k",
            "--iodepth=16",
            "--offset=64m",
            "--size=32m",
        ])
        .succeed();
    Fio::plain(&uri)
        .args([
            "--rw=trimwrite",
            "--bs=64k",
            "--iodepth=8",
            "--offset=96m",
            "--size=16m",
        ])
        .succeed();
    Fio::verify(&uri)
        .args(written)
        .arg("--verify_only")
        .succeed();
    let trimmed = ["-f", "raw", &uri, "-c", "read -P 0 64M 32M"];
    let said = Tool::new("qemu-io").args(trimmed).succeed();
    assert!(!said.contains("verification failed"), "{said}");
}

/// A client that reconnects sees a pause and nothing else, over kill -9 and a restart.
#[test]
fn fio_verify_goes_on_over_a_kill() {
    let (mut daemon, uri) = serve("fio-kill", "64MiB");
    let socket = daemon.scratch.join("p");
    let proxy = Tool::new("nbdkit")
        .args(["-f", "--filter=retry", "nbd"])
        .arg(format!("uri={uri}"))
        .args(["retries=30", "retry-delay=1", "retry-exponential=no"])
        .arg("-U")
        .arg(&socket)
        .limit(4 * MINUTES)
        .start();
    wait::until(Duration::from_secs(20), "nbdkit", || {
        fs::metadata(&socket).map_err(|error| error.to_string())
    });
    let through = format!("nbd+unix:///?socket={}", socket.display());
    let mut fio = Fio::verify(&through)
        .args([
            "--rw=randwrite",
            "--bs=4k",
            "--iodepth=8",
            "--size=64m",
            "--rate_iops=4000",
            "--io_size=96m",
        ])
        .start();
    let mut killed = 0;
    let operations = |daemon: &Daemon| {
        let connection = daemon.try_open("disk", Wishes::SIMPLE);
        connection.map(drop).map_err(|error| error.to_string())
    };
    for _ in 0..3 {
        wait::until(Duration::from_secs(20), "the volume is served", || {
            operations(&daemon)
        });
        wait::pass(Duration::from_millis(900));
        if !fio.is_running() {
            break;
        }
        daemon.kill();
        daemon.start();
        killed += 1;
    }
    fio.finish().success();
    assert!(killed >= 2, "fio was done after {killed} kills");
    proxy.abandon();
}

/// CAN_MULTI_CONN: what one connection was told is done, another sees, and its flush covers.
#[test]
fn two_connections_see_each_other() {
    let (mut daemon, _uri) = serve("multi-conn", "64MiB");
    let mut rng = Rng::new(seed::of_run("multi-conn"));
    for round in 0..5 {
        let mut one = daemon.open("disk", Wishes::SIMPLE);
        let mut other = daemon.open("disk", Wishes::EXTENDED);
        let mut written = Vec::new();
        for n in 0..100 {
            let offset = rng.below((64 << 20) - 9000);
            let data = rng.bytes(1 + rng.clone().below(9000) as usize);
            one.write(offset, &data).unwrap();
            assert!(
                other.read(offset, data.len() as u64).unwrap() == data,
                "write {n} of round {round} is not seen"
            );
            written.push((offset, data));
        }
        other.flush().unwrap();
        daemon.kill();
        daemon.start();
        let mut after = daemon.open("disk", Wishes::STRUCTURED);
        // Later writes may cover earlier ones: replay them.
        let mut model = std::collections::BTreeMap::new();
        for (offset, data) in &written {
            model.extend(
                data.iter()
                    .enumerate()
                    .map(|(at, byte)| (offset + at as u64, *byte)),
            );
        }
        for (offset, data) in &written {
            let read = after.read(*offset, data.len() as u64).unwrap();
            let expected: Vec<u8> = (0..data.len() as u64)
                .map(|at| model[&(offset + at)])
                .collect();
            assert!(read == expected, "round {round}: at {offset}");
        }
    }
}

//! Putting the driver where the kubelet finds it.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::{OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};

use anyhow::{Context, ensure};

use super::read_arguments;

/// The driver's directory and name below the kubelet's: `VENDOR~DRIVER/DRIVER`.
const DIRECTORY: &str = "ashlar.io~ashlar";
const DRIVER: &str = "ashlar";
/// The settings, beside the driver.
pub const CONFIGURATION: &str = "flexvolume.conf";

/// Installs this program below `plugins`, a kubelet's directory of volume plugins, with settings that its calls will have.
/// Returns where it is.
///
/// The kubelet looks as soon as something appears, and must never run half a program: it is copied to a name with a dot,
/// which is passed over, and renamed. A driver that is there is replaced while it is in use.
pub fn install(plugins: &Path, settings: &[String]) -> anyhow::Result<PathBuf> {
    read_arguments(settings)?;
    ensure!(
        settings.iter().all(|line| line.trim() == line
            && !line.is_empty()
            && !line.starts_with('#')
            && !line.contains('\n')),
        "each setting is one word, as in --daemon=unix:/run/ashlar/admin.sock"
    );
    let program = std::env::current_exe().context("which program this is")?;
    let directory = plugins.join(DIRECTORY);
    fs::create_dir_all(&directory).with_context(|| format!("making {}", directory.display()))?;
    let mut lines = String::from("# An argument a line; see ashlar-csi --help.\n");
    for line in settings {
        lines.push_str(line);
        lines.push('\n');
    }
    let placed = replace(&directory, CONFIGURATION, 0o600, &mut lines.as_bytes())
        .and_then(|_| replace(&directory, DRIVER, 0o755, &mut File::open(&program)?));
    placed.with_context(|| format!("installing into {}", directory.display()))
}

fn replace(
    directory: &Path,
    name: &str,
    mode: u32,
    content: &mut dyn io::Read,
) -> io::Result<PathBuf> {
    let (fresh, path) = (directory.join(format!(".{name}")), directory.join(name));
    match fs::remove_file(&fresh) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
        _ => {}
    }
    let mut file = OpenOptions::new()
        .create_new(true)
        .write(true)
        .mode(mode)
        .open(&fresh)?;
    // Whatever the umask is.
    file.set_permissions(fs::Permissions::from_mode(mode))?;
    io::copy(content, &mut file)?;
    file.flush()?;
    file.sync_all()?;
    drop(file);
    fs::rename(&fresh, &path)?;
    File::open(directory)?.sync_all()?;
    Ok(path)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_driver_is_replaced_whole_and_its_settings_are_checked() {
        let scratch = tempfile::tempdir().expect("a directory");
        let wrong = install(scratch.path(), &["--nonsense".to_owned()]);
        assert!(wrong.is_err());
        assert!(!scratch.path().join(DIRECTORY).exists(), "nothing is begun");
        let settings = ["--attach=fuse".to_owned()];
        for _ in 0..2 {
            let path = install(scratch.path(), &settings).expect("installed");
            assert_eq!(path, scratch.path().join("ashlar.io~ashlar/ashlar"));
            let mode = fs::metadata(&path).expect("there").permissions().mode();
            assert_eq!(mode & 0o777, 0o755);
            let own = std::env::current_exe().expect("a program");
            assert_eq!(
                fs::metadata(&path).expect("there").len(),
                fs::metadata(own).expect("there").len()
            );
            let beside = fs::read_to_string(path.with_file_name(CONFIGURATION)).expect("read");
            assert!(beside.ends_with("\n--attach=fuse\n"), "{beside}");
            let all = fs::read_dir(scratch.path().join(DIRECTORY)).expect("listed");
            assert_eq!(all.count(), 2, "no dot file is left");
        }
    }
}

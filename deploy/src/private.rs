//! Files that nobody else can read, and where they lie.

use std::fs::{DirBuilder, OpenOptions};
use std::io::{Result, Write};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

/// Makes a new file.
///
/// # Errors
/// If there is one, or it cannot be written.
pub(crate) fn create(file: &Path, text: &str) -> Result<()> {
    let mut opened = OpenOptions::new().write(true).create_new(true).mode(0o600).open(file)?;
    opened.write_all(text.as_bytes())?;
    opened.sync_all()
}

/// Puts a file in the place of what is there: readers see the one or the other, whole.
///
/// # Errors
/// If that cannot be done.
pub(crate) fn replace(file: &Path, text: &str) -> Result<()> {
    let mut beside = file.as_os_str().to_owned();
    beside.push(format!(".{}", std::process::id()));
    let beside = PathBuf::from(beside);
    // What another process of that number has left.
    let _ = std::fs::remove_file(&beside);
    create(&beside, text)?;
    std::fs::rename(&beside, file)
}

/// Makes a folder and those above it.
///
/// # Errors
/// If that cannot be done.
pub(crate) fn make_folder(folder: &Path) -> Result<()> {
    DirBuilder::new().recursive(true).mode(0o700).create(folder)
}

/// Where one's settings lie; none: nobody says where one's home is.
pub(crate) fn config_folder() -> Option<PathBuf> {
    let set = |name: &str| std::env::var_os(name).map(PathBuf::from).filter(|path| path.is_absolute());
    let config = set("XDG_CONFIG_HOME").or_else(|| Some(set("HOME")?.join(".config")))?;
    Some(config.join("gleaner"))
}

/// Where what is running leaves word for others of the same user: the first that can be written is taken, and readers
/// look into each.
pub(crate) fn run_folders() -> Vec<PathBuf> {
    let runtime = std::env::var_os("XDG_RUNTIME_DIR").map(PathBuf::from).filter(|path| path.is_absolute());
    let runtime = runtime.map(|folder| folder.join("gleaner"));
    runtime.into_iter().chain(config_folder().map(|folder| folder.join("run"))).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::PermissionsExt;

    #[test]
    fn files_and_folders_are_for_oneself_alone() {
        let folder = tempfile::tempdir().expect("a folder");
        let inner = folder.path().join("a/b");
        make_folder(&inner).expect("made");
        make_folder(&inner).expect("it is there");
        let file = inner.join("token");
        create(&file, "one").expect("made");
        assert!(create(&file, "two").is_err(), "nothing is written over");
        replace(&file, "three").expect("replaced");
        assert_eq!(std::fs::read_to_string(&file).expect("read"), "three");
        let mode = |path: &Path| std::fs::metadata(path).expect("there").permissions().mode() & 0o777;
        assert_eq!((mode(&file), mode(&inner)), (0o600, 0o700));
        assert_eq!(std::fs::read_dir(&inner).expect("a folder").count(), 1);
    }
}

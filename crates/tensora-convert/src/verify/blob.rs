//! Files of a Hugging Face cache, whose names say what is in them.

use std::fs;
use std::path::{Path, PathBuf};

use crate::Digest;

/// As many as Linux follows.
const MAX_LINKS: usize = 40;

/// The SHA-256 that the file which `path` leads to is named by.
///
/// A cache holds files as `blobs/ID`, and snapshots of symbolic links to them. The ID of a large file is
/// its SHA-256; that of a small one is the SHA-1 of a Git object, of 40 digits.
pub(super) fn named_sha256(path: &Path) -> Option<Digest> {
    let mut path: PathBuf = path.to_owned();
    // Every link on the way, because what is behind a blob's name may be a link again: caches are
    // deduplicated and moved to other disks like that.
    for _ in 0..=MAX_LINKS {
        if let Some(digest) = sha256_in(&path) {
            return Some(digest);
        }
        let target = fs::read_link(&path).ok()?;
        path = path.parent()?.join(target);
    }
    None
}

fn sha256_in(path: &Path) -> Option<Digest> {
    if path.parent()?.file_name()? != "blobs" {
        return None;
    }
    let name = path.file_name()?.to_str()?;
    let digest: Digest = name.parse().ok()?;
    (digest.to_string() == name).then_some(digest)
}

#[cfg(all(test, unix))]
mod tests {
    use std::os::unix::fs::symlink;

    use super::*;

    const ID: &str = "af1349b9f5f9a1a6a0404dea36dcc9499bcb25c9adc112b7cc9a93cae41f3262";

    #[test]
    fn only_64_lower_case_digits_in_blobs_are_a_sha256() {
        let named = |path: &str| sha256_in(Path::new(path)).map(|digest| digest.to_string());
        assert_eq!(named(&format!("a/blobs/{ID}")).as_deref(), Some(ID));
        assert_eq!(named(&format!("../../blobs/{ID}")).as_deref(), Some(ID));
        for other in [
            format!("a/blob/{ID}"),
            format!("blobs/a/{ID}"),
            ID.to_owned(),
            format!("blobs/{}", ID.to_uppercase()),
            format!("blobs/{}", &ID[..40]),
            format!("blobs/{ID}.incomplete"),
        ] {
            assert_eq!(named(&other), None, "{other}");
        }
    }

    #[test]
    fn links_are_followed_to_the_first_name_that_says_something() {
        let directory = tempfile::tempdir().unwrap();
        let root = directory.path();
        fs::create_dir_all(root.join("cache/blobs")).unwrap();
        fs::create_dir_all(root.join("cache/snapshots/main")).unwrap();
        fs::write(root.join("elsewhere"), "").unwrap();
        symlink(root.join("elsewhere"), root.join("cache/blobs").join(ID)).unwrap();
        let snapshot = root.join("cache/snapshots/main/model.safetensors");
        symlink(format!("../../blobs/{ID}"), &snapshot).unwrap();
        symlink("cache/snapshots/main/model.safetensors", root.join("link")).unwrap();
        symlink("loop", root.join("loop")).unwrap();
        symlink("elsewhere", root.join("plain")).unwrap();

        let expected: Digest = ID.parse().unwrap();
        assert_eq!(named_sha256(&snapshot), Some(expected));
        assert_eq!(named_sha256(&root.join("link")), Some(expected));
        assert_eq!(
            named_sha256(&root.join("cache/blobs").join(ID)),
            Some(expected)
        );
        for other in ["loop", "plain", "elsewhere", "absent"] {
            assert_eq!(named_sha256(&root.join(other)), None, "{other}");
        }
    }
}

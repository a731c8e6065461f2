use std::ffi::OsString;
use std::fs::{self, File, OpenOptions};
use std::io::{self, Read, Write};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU32, Ordering};

use crate::{
    Error, Measurement, Platform, Profile, ProfileFact, ProfileIdentity, Result, SourceFile,
};

/// A profile of hundreds of measurements has a tenth of this; what is larger is no profile.
const MAX_FILE_BYTES: u64 = 1 << 20;
/// The longest part of a file's name that each fact gets: four of them stay below the usual limit of 255.
const MAX_PART_CHARS: usize = 60;

/// A folder of [`Profile`]s, one file for each device and file system.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ProfileStore {
    folder: PathBuf,
}

impl ProfileStore {
    /// The store of this user: `tensora/profiles` below `$XDG_CACHE_HOME`, or below `$HOME/.cache` where
    /// that is not an absolute path; `None` where neither is one.
    pub fn user() -> Option<Self> {
        user_folder(std::env::var_os("XDG_CACHE_HOME"), std::env::var_os("HOME")).map(Self::at)
    }

    /// A store in this folder, which need not exist yet.
    pub fn at(folder: impl Into<PathBuf>) -> Self {
        Self {
            folder: folder.into(),
        }
    }

    /// The folder.
    pub fn folder(&self) -> &Path {
        &self.folder
    }

    /// Where the profile of this place is kept.
    pub fn path_of(&self, identity: &ProfileIdentity) -> PathBuf {
        let parts = [
            Some(identity.file_system.as_str()),
            identity.device.as_deref(),
            identity.mount_source.as_deref(),
        ];
        let parts: Vec<_> = parts.into_iter().flatten().map(file_name_part).collect();
        self.folder.join(format!("{}.json", parts.join("+")))
    }

    /// What this store knows about the place of a platform whose storage was probed. Never fails:
    /// a file that cannot be used is [`ProfileFact::Ignored`], with the reason.
    pub fn find(&self, platform: &Platform) -> ProfileFact {
        let Some(identity) = ProfileIdentity::of(platform) else {
            return ProfileFact::NotSought;
        };
        let path = self.path_of(&identity);
        let ignored = |reason: String| ProfileFact::Ignored {
            reason: format!("{}: {reason}", path.display()),
        };
        let text = match read(&path) {
            Ok(Some(text)) => text,
            Ok(None) => return ProfileFact::Absent,
            Err(reason) => return ignored(reason),
        };
        match parse(&text) {
            Ok(profile) => match profile.mismatch(&identity) {
                None => ProfileFact::Matching(Box::new(profile)),
                Some(reason) => ignored(reason),
            },
            Err(reason) => ignored(reason),
        }
    }

    /// Keeps a profile in place of the one that was made at the same place before, all of it or nothing;
    /// says where. The folder is made if need be.
    ///
    /// # Errors
    ///
    /// [`Error::File`] when the folder or the file cannot be written, and for a profile that
    /// [`find`](Self::find) would not believe: one without measurements, or with impossible ones.
    pub fn save(&self, profile: &Profile) -> Result<PathBuf> {
        let path = self.path_of(&profile.identity);
        let failed = |operation, path: &Path, source| Error::file(operation, path, source);
        check(profile).map_err(|reason| {
            failed(
                "store a profile in",
                &path,
                io::Error::new(io::ErrorKind::InvalidInput, reason),
            )
        })?;
        let text = serde_json::to_vec(profile)
            .map_err(|error| failed("store a profile in", &path, error.into()))?;
        fs::create_dir_all(&self.folder)
            .map_err(|source| failed("make the folder", &self.folder, source))?;
        // Processes and threads may calibrate at the same time; the last one that is done stays.
        static NUMBER: AtomicU32 = AtomicU32::new(0);
        let number = NUMBER.fetch_add(1, Ordering::Relaxed);
        let temporary = self
            .folder
            .join(format!(".{}-{number}.tmp", std::process::id()));
        let written = write(&temporary, &text).and_then(|()| fs::rename(&temporary, &path));
        written.map_err(|source| {
            let _ = fs::remove_file(&temporary);
            failed("store a profile in", &path, source)
        })?;
        Ok(path)
    }
}

fn user_folder(cache: Option<OsString>, home: Option<OsString>) -> Option<PathBuf> {
    // The XDG specification has relative paths ignored.
    let absolute =
        |value: Option<OsString>| value.map(PathBuf::from).filter(|path| path.is_absolute());
    let cache = absolute(cache).or_else(|| Some(absolute(home)?.join(".cache")))?;
    Some(cache.join("tensora").join("profiles"))
}

/// A fact as part of a file's name: letters, digits and little else, so that no name of a device or a
/// server leads out of the folder. Facts that become the same are told apart by the profile's identity.
fn file_name_part(fact: &str) -> String {
    fact.chars()
        .take(MAX_PART_CHARS)
        .map(|c| match c {
            'a'..='z' | 'A'..='Z' | '0'..='9' | '-' | '_' => c,
            _ => '_',
        })
        .collect()
}

/// The content of a file; `None` where there is none.
fn read(path: &Path) -> Result<Option<Vec<u8>>, String> {
    let file = match SourceFile::open(path) {
        Ok(file) => file,
        Err(Error::File { source, .. }) if source.kind() == io::ErrorKind::NotFound => {
            return Ok(None);
        }
        Err(Error::File { source, .. }) => return Err(format!("it cannot be opened: {source}")),
        Err(Error::NotARegularFile { found, .. }) => return Err(format!("it is a {found}")),
        Err(error) => return Err(error.to_string()),
    };
    let mut text = Vec::new();
    let mut limited = file.file().take(MAX_FILE_BYTES + 1);
    limited
        .read_to_end(&mut text)
        .map_err(|source| format!("it cannot be read: {source}"))?;
    if text.len() as u64 > MAX_FILE_BYTES {
        return Err(format!(
            "it has more than {MAX_FILE_BYTES} bytes, so it is no profile"
        ));
    }
    Ok(Some(text))
}

fn parse(text: &[u8]) -> Result<Profile, String> {
    /// What every version has.
    #[derive(serde::Deserialize)]
    struct Version {
        version: u32,
    }

    let damaged = |error: serde_json::Error| {
        format!(
            "it is damaged at line {}, column {}",
            error.line(),
            error.column()
        )
    };
    let Version { version } = serde_json::from_slice(text).map_err(damaged)?;
    if version != Profile::VERSION {
        return Err(format!(
            "it is of version {version}, and this program makes and reads version {}",
            Profile::VERSION
        ));
    }
    let profile = serde_json::from_slice(text).map_err(damaged)?;
    check(&profile)?;
    Ok(profile)
}

/// Whether a profile says something, and nothing impossible.
fn check(profile: &Profile) -> Result<(), String> {
    if profile.measurements.is_empty() {
        return Err("it has no measurements".to_owned());
    }
    for (number, measurement) in profile.measurements.iter().enumerate() {
        check_measurement(measurement)
            .map_err(|reason| format!("measurement {number} is impossible: {reason}"))?;
    }
    Ok(())
}

fn check_measurement(measurement: &Measurement) -> Result<(), String> {
    if measurement.bytes == 0 || measurement.elapsed_us.is_empty() {
        return Err("nothing was read".to_owned());
    }
    if measurement.elapsed_us.contains(&0) {
        return Err("a read took no time".to_owned());
    }
    measurement
        .params
        .validate()
        .map_err(|error| error.to_string())
}

/// Writes a new file and has it stored.
fn write(path: &Path, text: &[u8]) -> io::Result<()> {
    let mut file: File = OpenOptions::new().write(true).create_new(true).open(path)?;
    file.write_all(text)?;
    file.sync_all()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_folder_follows_the_xdg_specification() {
        let folder = |cache: Option<&str>, home: Option<&str>| {
            user_folder(cache.map(Into::into), home.map(Into::into))
        };
        let below = |path: &str| Some(PathBuf::from(path));
        assert_eq!(folder(Some("/c"), Some("/h")), below("/c/tensora/profiles"));
        assert_eq!(
            folder(Some("c"), Some("/h")),
            below("/h/.cache/tensora/profiles")
        );
        assert_eq!(
            folder(Some(""), Some("/h")),
            below("/h/.cache/tensora/profiles")
        );
        assert_eq!(folder(None, Some("h")), None);
        assert_eq!(folder(None, None), None);
    }

    #[test]
    fn no_name_leads_out_of_the_folder() {
        let mut platform = Platform::unknown(1, Vec::new());
        platform.storage = Some(crate::StorageFacts::unknown());
        let mut identity = ProfileIdentity::of(&platform).unwrap();
        let store = ProfileStore::at("/profiles");
        assert_eq!(
            store.path_of(&identity),
            Path::new("/profiles/unknown.json")
        );
        for name in [
            "../../etc/passwd",
            "/etc/passwd",
            "..",
            ".",
            "a\0b",
            "é\n",
            &"x".repeat(5000),
        ] {
            identity.file_system = name.to_owned();
            identity.device = Some(name.to_owned());
            identity.mount_source = Some(name.to_owned());
            let path = store.path_of(&identity);
            assert_eq!(path.parent(), Some(store.folder()), "{}", path.display());
            let file_name = path.file_name().unwrap().to_str().unwrap();
            assert!(file_name.len() < 255 && file_name.is_ascii(), "{file_name}");
            assert!(!file_name.contains('\0'), "{file_name}");
        }
    }
}

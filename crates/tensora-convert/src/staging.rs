//! Where files are until all of them are complete, and how they get their names.
//!
//! A conversion writes into a directory inside the target, beside a journal of what is finished. When
//! everything is, a marker tells readers to keep away, the files get their names, and the marker goes. So
//! the target is at every moment what it was before, refused, or complete.

use std::collections::{BTreeSet, HashSet};
use std::ffi::OsString;
use std::fs::{self, File, OpenOptions};
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard, PoisonError};

use tensora_formats::UNFINISHED_NAME;

use crate::journal::{self, Fingerprint, Finished, Journal, Record};
use crate::target::{Replaced, nearest_existing, or_current, refused, sync_directory};
use crate::{Error, Kept, Result, Unfinished};

/// Hidden, so that no reader takes it for a rank or a shard.
const DIRECTORY_NAME: &str = ".tensora-convert";
/// Hidden, as no file of a checkpoint and no companion is.
const JOURNAL_NAME: &str = ".journal";

fn directory(target: &Path) -> PathBuf {
    target.join(DIRECTORY_NAME)
}

/// What an interrupted conversion left in `target`. Whether its files are still whole is not looked at.
pub(crate) fn kept(target: &Path) -> Result<Kept> {
    let record = journal::peek(&directory(target).join(JOURNAL_NAME))?.unwrap_or_default();
    Ok(Kept {
        files: record.finished.len(),
        bytes: record
            .finished
            .values()
            .fold(0, |sum, file| sum.saturating_add(file.bytes)),
    })
}

/// Checks that what an interrupted conversion left in `target` does not forbid another. Returns whether
/// one is to be finished that has begun to put its files in place.
pub(crate) fn check(target: &Path, unfinished: Unfinished) -> Result<bool> {
    let directory = directory(target);
    if !exists(&directory)? {
        // Somebody removed the files, and not the marker.
        let marker = target.join(UNFINISHED_NAME);
        return match exists(&marker)? {
            true if unfinished != Unfinished::Discard => Err(Error::StrayMarker { path: marker }),
            _ => Ok(false),
        };
    }
    check_own(&directory)?;
    let journal = directory.join(JOURNAL_NAME);
    let found = journal::peek(&journal)?;
    if found.is_some() && unfinished == Unfinished::Refuse {
        journal::check_free(&journal)?;
    }
    let record = found.unwrap_or_default();
    if !is_untouched(&directory, &record) {
        check_record(&directory, &record, unfinished)?;
    }
    Ok(record.is_committing)
}

/// Whether nothing has been written there: a conversion has just begun, or was killed as it began.
fn is_untouched(directory: &Path, record: &Record) -> bool {
    let is_nothing = |(name, _): &(OsString, bool)| name == JOURNAL_NAME;
    record.is_empty() && entries(directory).iter().all(is_nothing)
}

/// Checks that the directory was made by this user. What is in it may be kept, or removed.
fn check_own(directory: &Path) -> Result<()> {
    let found = fs::symlink_metadata(directory).map_err(refused(directory, "access"))?;
    let refuse = |what| {
        Err(Error::NotStaging {
            path: directory.to_owned(),
            what,
        })
    };
    if !found.is_dir() {
        return refuse("is no directory");
    }
    #[cfg(unix)]
    {
        use std::os::unix::fs::MetadataExt;
        if found.uid() != rustix::process::geteuid().as_raw() {
            return refuse("belongs to another user");
        }
    }
    Ok(())
}

/// Checks that what a journal says does not forbid to go on, or to start over.
fn check_record(directory: &Path, record: &Record, unfinished: Unfinished) -> Result<()> {
    let path = directory.to_owned();
    match unfinished {
        Unfinished::Refuse => Err(Error::Interrupted {
            path,
            files: record.finished.len(),
        }),
        Unfinished::Discard if record.is_committing => Err(Error::OnlyToBeFinished { path }),
        Unfinished::Resume if record.is_foreign => Err(Error::CannotResume {
            path,
            what: "another version of this program wrote its journal",
        }),
        Unfinished::Discard | Unfinished::Resume => Ok(()),
    }
}

/// Whether an interrupted conversion, or one under way, has left anything in `target`.
pub(crate) fn is_there(target: &Path) -> Result<bool> {
    exists(&directory(target))
}

fn exists(path: &Path) -> Result<bool> {
    match fs::symlink_metadata(path) {
        Ok(_) => Ok(true),
        Err(error)
            if matches!(
                error.kind(),
                io::ErrorKind::NotFound | io::ErrorKind::NotADirectory
            ) =>
        {
            Ok(false)
        }
        Err(error) => Err(refused(path, "access")(error)),
    }
}

/// The directory that a conversion writes into. Dropped before [`place`](Self::place) has begun, it
/// keeps what is finished, and removes what is not.
#[derive(Debug)]
pub(crate) struct Staging {
    target: PathBuf,
    directory: PathBuf,
    /// Directories above that did not exist before, outermost first.
    created: Vec<PathBuf>,
    progress: Mutex<Progress>,
}

/// Files that have got their names, in directories that are still marked as incomplete.
#[derive(Debug)]
#[must_use]
pub(crate) struct Placed {
    directories: BTreeSet<PathBuf>,
}

#[derive(Debug)]
struct Progress {
    journal: Journal,
    record: Record,
}

impl Staging {
    /// Makes the directory, and those above it, or takes up what an interrupted conversion left.
    pub(crate) fn open(
        target: &Path,
        fingerprint: &Fingerprint,
        unfinished: Unfinished,
    ) -> Result<Self> {
        // Again, because another conversion may have begun since it was planned.
        check(target, unfinished)?;
        let staging = directory(target);
        let mut created = Vec::new();
        if let Err(error) = create_directories(target, &staging, &mut created) {
            remove_directories(&created);
            return Err(error);
        }
        // Another conversion may have begun in what this one has created; then it stays.
        let tidy = |error| {
            remove_directories(&created);
            error
        };
        check_own(&staging).map_err(tidy)?;
        let (journal, mut record) = Journal::open(&staging.join(JOURNAL_NAME)).map_err(tidy)?;
        // Whoever has the journal has the directory, and not who created it.
        if !is_untouched(&staging, &record) {
            // Now that nobody else can change it.
            check_record(&staging, &record, unfinished)?;
            match unfinished {
                Unfinished::Resume => check_fingerprint(&staging, &record, fingerprint)?,
                _ => record = Record::default(),
            }
        }
        let is_begun = record.fingerprint.is_some();
        let resumed = record.clone();
        record.fingerprint = Some(fingerprint.clone());
        created.retain(|path| *path != staging);
        // From here on, dropping it tidies up.
        let staging = Self {
            target: target.to_owned(),
            directory: staging,
            created,
            progress: Mutex::new(Progress { journal, record }),
        };
        match is_begun {
            true => staging.progress().journal.resume(&resumed)?,
            false => staging.progress().journal.begin(fingerprint)?,
        }
        staging.remove_unfinished();
        mark(&staging.directory)?;
        sync_directory(&staging.directory)?;
        Ok(staging)
    }

    fn progress(&self) -> MutexGuard<'_, Progress> {
        self.progress.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether it has begun to give files their names, in this run or in an interrupted one.
    pub(crate) fn is_committing(&self) -> bool {
        self.progress().record.is_committing
    }

    pub(crate) fn directory(&self) -> &Path {
        &self.directory
    }

    /// Where a file is until it gets its name, in a directory that exists.
    pub(crate) fn path(&self, name: &str) -> Result<PathBuf> {
        let path = self.directory.join(name);
        create_parent(&self.directory, &path)?;
        Ok(path)
    }

    /// Where a file is that an interrupted conversion finished, according to the journal.
    pub(crate) fn finished(&self, name: &str) -> Option<(PathBuf, Finished)> {
        let progress = self.progress();
        let finished = *progress.record.finished.get(name)?;
        let staged = self.directory.join(name);
        // It may have got its name before the conversion was interrupted.
        let path = match progress.record.is_committing && !is_file(&staged) {
            true => self.target.join(name),
            false => staged,
        };
        Some((path, finished))
    }

    /// Records that a file is complete, and safe on the device.
    pub(crate) fn finish(&self, name: &str, finished: Finished) -> Result<()> {
        // The name has to be as safe as the content.
        if let Some(parent) = self.directory.join(name).parent() {
            sync_directory(parent)?;
        }
        let mut progress = self.progress();
        progress.journal.finish(name, finished)?;
        progress.record.finished.insert(name.to_owned(), finished);
        Ok(())
    }

    /// Keeps nothing, because it is of no use to anybody. To be followed by dropping this.
    pub(crate) fn discard(&self) {
        self.progress().record.finished.clear();
    }

    /// Forgets a file that is not what the journal says, and removes it.
    pub(crate) fn forget(&self, name: &str) -> Result<()> {
        {
            let mut progress = self.progress();
            let Progress { journal, record } = &mut *progress;
            record.finished.remove(name);
            journal.forget(name)?;
        }
        remove(&self.directory.join(name))
    }

    /// Creates a file, also where an interrupted conversion has left one.
    pub(crate) fn create(&self, name: &str) -> Result<(File, PathBuf)> {
        let path = self.path(name)?;
        remove(&path)?;
        let file = OpenOptions::new()
            .write(true)
            .create_new(true)
            .open(&path)
            .map_err(refused(&path, "create"))?;
        Ok((file, path))
    }

    /// Gives all files their names: `data` in that order, then `indexes`, each of which makes a checkpoint
    /// of what is beside it. `replaced` are files of the target that are to be gone.
    ///
    /// What is there then is whole, but marked as incomplete until [`complete`](Self::complete). Interrupted, by an
    /// error or a crash, it is taken up where it was.
    pub(crate) fn place(
        &self,
        data: &[String],
        indexes: &[String],
        replaced: &Replaced,
    ) -> Result<Placed> {
        let names = data.iter().chain(indexes).map(Path::new);
        let mut directories: BTreeSet<PathBuf> = names
            .chain(replaced.files.iter().map(PathBuf::as_path))
            .filter_map(|name| Some(self.target.join(name.parent()?)))
            .chain([self.target.clone()])
            .collect();
        let gone: BTreeSet<PathBuf> = replaced
            .directories
            .iter()
            .map(|name| self.target.join(name))
            .collect();
        directories.extend(gone.iter().cloned());
        {
            let mut progress = self.progress();
            if !progress.record.is_committing {
                progress.journal.commit()?;
                progress.record.is_committing = true;
            }
        }
        for directory in &directories {
            create_parent(&self.target, &directory.join(UNFINISHED_NAME))?;
            mark(directory)?;
            sync_directory(directory)?;
        }
        // For readers that know nothing of the marker, as little as possible looks like a checkpoint.
        let is_staged = |name: &Path| is_file(&self.directory.join(name));
        for name in stale(&replaced.files, data, indexes, is_staged) {
            remove(&self.target.join(name))?;
        }
        for directory in &directories {
            sync_directory(directory)?;
        }
        for name in data {
            self.rename(name)?;
        }
        for directory in &directories {
            sync_directory(directory)?;
        }
        for name in indexes {
            self.rename(name)?;
        }
        for directory in &directories {
            sync_directory(directory)?;
        }
        // Now, because a rank without a checkpoint would keep the target from being opened and read back.
        for directory in &gone {
            remove(&directory.join(UNFINISHED_NAME))?;
            match fs::remove_dir(directory) {
                Err(error) if error.kind() == io::ErrorKind::NotFound => {}
                removed => removed.map_err(refused(directory, "remove"))?,
            }
        }
        sync_directory(&self.target)?;
        directories.retain(|directory| !gone.contains(directory));
        Ok(Placed { directories })
    }

    /// Lets what was placed be a checkpoint, and removes all that is left of making it.
    pub(crate) fn complete(&self, placed: &Placed) -> Result<()> {
        // The root comes first in this order, and loses its marker last.
        for directory in placed.directories.iter().rev() {
            remove(&directory.join(UNFINISHED_NAME))?;
            sync_directory(directory)?;
        }
        self.remove_all();
        // Without it, a crash could leave a conversion to be finished of which it was said that it is.
        sync_directory(&self.target)
    }

    /// Gives a file its name, unless it got it before the conversion was interrupted.
    fn rename(&self, name: &str) -> Result<()> {
        let (staged, path) = (self.directory.join(name), self.target.join(name));
        match fs::rename(&staged, &path) {
            Err(error) if error.kind() == io::ErrorKind::NotFound && is_file(&path) => Ok(()),
            renamed => renamed.map_err(refused(&path, "rename a temporary file to")),
        }
    }

    /// Removes every file that is not finished. What cannot be removed now is overwritten later.
    fn remove_unfinished(&self) {
        let progress = self.progress();
        for (name, is_directory) in entries(&self.directory) {
            let name = PathBuf::from(name);
            // Those of ranks are all that there are.
            let files = match is_directory {
                true => entries(&self.directory.join(&name))
                    .into_iter()
                    .map(|(file, _)| name.join(file))
                    .collect(),
                false => vec![name],
            };
            let is_finished = |name: &Path| {
                name.to_str()
                    .is_some_and(|name| progress.record.finished.contains_key(name))
            };
            for name in files {
                if name != Path::new(JOURNAL_NAME) && !is_finished(&name) {
                    let path = self.directory.join(&name);
                    warn(fs::remove_file(&path), &path);
                }
            }
        }
    }

    /// Removes the directory and all that is in it; the journal last, because it says what there is.
    fn remove_all(&self) {
        let journal = self.directory.join(JOURNAL_NAME);
        for (name, is_directory) in entries(&self.directory) {
            let path = self.directory.join(&name);
            if is_directory {
                warn(fs::remove_dir_all(&path), &path);
            } else if path != journal {
                warn(fs::remove_file(&path), &path);
            }
        }
        warn(fs::remove_file(&journal), &journal);
        warn(fs::remove_dir(&self.directory), &self.directory);
    }
}

/// What is in a directory, and whether that is a directory itself. Symbolic links are not followed.
fn entries(directory: &Path) -> Vec<(OsString, bool)> {
    let Ok(entries) = fs::read_dir(directory) else {
        return Vec::new();
    };
    entries
        .filter_map(|entry| {
            let entry = entry.ok()?;
            Some((entry.file_name(), entry.file_type().ok()?.is_dir()))
        })
        .collect()
}

/// What of `replaced` goes before new files come, in this order: first what makes a checkpoint of others.
fn stale<'a>(
    replaced: &'a [PathBuf],
    data: &[String],
    indexes: &[String],
    is_staged: impl Fn(&Path) -> bool,
) -> Vec<&'a Path> {
    let set = |names: &[String]| names.iter().map(PathBuf::from).collect::<HashSet<_>>();
    let (data, indexes) = (set(data), set(indexes));
    let is_old = |name: &&Path| {
        // What has its name already, from before the interruption, is not old.
        let is_placed = indexes.contains(*name) && !is_staged(name);
        // Data is replaced by being renamed over.
        !data.contains(*name) && !is_placed && !name.ends_with(UNFINISHED_NAME)
    };
    let mut stale: Vec<&Path> = replaced
        .iter()
        .map(PathBuf::as_path)
        .filter(is_old)
        .collect();
    let is_json = |name: &Path| {
        name.extension()
            .is_some_and(|extension| extension == "json")
    };
    stale.sort_by_key(|name| !is_json(name) && !indexes.contains(*name));
    stale
}

/// Whether a regular file is there, and not a link to one.
fn is_file(path: &Path) -> bool {
    fs::symlink_metadata(path).is_ok_and(|found| found.is_file())
}

impl Drop for Staging {
    fn drop(&mut self) {
        let (is_committing, is_empty) = {
            let progress = self.progress();
            (
                progress.record.is_committing,
                progress.record.finished.is_empty(),
            )
        };
        // Then either all is done, or the files are what the journal says.
        if is_committing {
            return;
        }
        if is_empty {
            self.remove_all();
            remove_directories(&self.created);
        } else {
            self.remove_unfinished();
        }
    }
}

fn check_fingerprint(staging: &Path, record: &Record, fingerprint: &Fingerprint) -> Result<()> {
    let what = match &record.fingerprint {
        // Interrupted before anything was written.
        None => return Ok(()),
        Some(found) if found.source != fingerprint.source => {
            "it was a conversion of another source, or the source has changed since"
        }
        Some(found) if found.target != fingerprint.target => {
            "it was a conversion to another format or with other options"
        }
        Some(_) => return Ok(()),
    };
    let path = staging.to_owned();
    Err(match record.is_committing {
        true => Error::CannotFinish { path, what },
        false => Error::CannotResume { path, what },
    })
}

/// Tells readers that this directory is not complete.
fn mark(directory: &Path) -> Result<()> {
    let path = directory.join(UNFINISHED_NAME);
    let text = "A conversion has not put all of its files in place here; `tensora convert` with --resume does.\n";
    // Not through a link that somebody has put there.
    let created = OpenOptions::new().write(true).create_new(true).open(&path);
    match created {
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => Ok(()),
        created => created
            .and_then(|mut file| {
                file.write_all(text.as_bytes())?;
                file.sync_all()
            })
            .map_err(refused(&path, "create")),
    }
}

/// Removes a file that may be gone already.
fn remove(path: &Path) -> Result<()> {
    match fs::remove_file(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        removed => removed.map_err(refused(path, "remove")),
    }
}

/// Creates the directory that `path`, at most one level below `root`, is in.
fn create_parent(root: &Path, path: &Path) -> Result<()> {
    match path.parent() {
        Some(parent) if parent != root => match fs::create_dir(parent) {
            Err(error) if error.kind() != io::ErrorKind::AlreadyExists => {
                Err(refused(parent, "create")(error))
            }
            _ => sync_directory(root),
        },
        _ => Ok(()),
    }
}

/// Creates what is missing of `target`, and the staging directory in it. `created` are those that were missing,
/// outermost first, also after an error.
///
/// Each name is safe on the device before anything is created below it, so that whoever resumes a conversion that was
/// killed knows that of all names but the last.
fn create_directories(target: &Path, staging: &Path, created: &mut Vec<PathBuf>) -> Result<()> {
    let existing = nearest_existing(target)?;
    let mut missing: Vec<&Path> = target
        .ancestors()
        .take_while(|&ancestor| ancestor != existing && !ancestor.as_os_str().is_empty())
        .collect();
    missing.reverse();
    match sync_parent(existing) {
        // Then no conversion has created it, which would have failed at this.
        Err(Error::Target { source, .. }) if is_about_syncing(&source) => {}
        synced => synced?,
    }
    for path in missing.into_iter().chain([staging]) {
        match fs::create_dir(path) {
            Ok(()) => created.push(path.to_owned()),
            // Somebody else was faster, or the path goes through `..`.
            Err(_) if path.is_dir() => {}
            Err(error) => return Err(refused(path, "create")(error)),
        }
        sync_parent(path)?;
    }
    Ok(())
}

/// Makes the name of a directory survive a crash.
fn sync_parent(path: &Path) -> Result<()> {
    path.parent()
        .map_or(Ok(()), |parent| sync_directory(or_current(parent)))
}

/// Whether a directory may not be opened to be synced, or is on a file system that knows no such thing.
fn is_about_syncing(error: &io::Error) -> bool {
    matches!(
        error.kind(),
        io::ErrorKind::PermissionDenied
            | io::ErrorKind::InvalidInput
            | io::ErrorKind::Unsupported
            | io::ErrorKind::ReadOnlyFilesystem
    )
}

fn remove_directories(created: &[PathBuf]) {
    for path in created.iter().rev() {
        // Somebody else's files may be in it by now; then it stays.
        let _ = fs::remove_dir(path);
    }
}

fn warn(removed: io::Result<()>, path: &Path) {
    match removed {
        Err(error) if error.kind() != io::ErrorKind::NotFound => {
            tracing::warn!(path = %path.display(), %error, "could not remove a temporary file");
        }
        _ => {}
    }
}

#[cfg(all(test, unix))]
mod tests {
    use std::time::{Duration, Instant};

    use super::*;
    use crate::target::SYNCED;

    fn fingerprint() -> Fingerprint {
        Fingerprint {
            source: "s".to_owned(),
            target: "t".to_owned(),
        }
    }

    /// The directories below `root` that are synced until a conversion can write, in order and without the staging
    /// directory itself.
    fn synced(root: &Path, target: &Path) -> Result<Vec<PathBuf>> {
        SYNCED.take();
        let staging = Staging::open(target, &fingerprint(), Unfinished::Refuse)?;
        let mut synced = SYNCED.take();
        synced.retain(|path| path.starts_with(root) && path != staging.directory());
        Ok(synced)
    }

    #[test]
    fn whoever_creates_a_directory_syncs_its_name_before_going_on() {
        let directory = tempfile::tempdir().unwrap();
        let root = directory.path();
        let above = [root.to_owned(), root.join("a"), root.join("a/b")];
        let target = root.join("a/b/target");
        assert_eq!(
            synced(root, &target).unwrap(),
            [&above[..], std::slice::from_ref(&target)].concat()
        );
        assert!(!root.join("a").exists());
        // Killed after a directory was created, and before its name was synced.
        fs::create_dir_all(&target).unwrap();
        assert_eq!(synced(root, &target).unwrap(), [root.join("a/b"), target]);
        fs::remove_dir(root.join("a/b/target")).unwrap();
        let target = root.join("a/b/target");
        assert_eq!(
            synced(root, &target).unwrap(),
            [root.join("a"), root.join("a/b"), target]
        );
    }

    #[test]
    fn what_is_replaced_goes_indexes_first() {
        let paths = |names: &[&str]| names.iter().map(PathBuf::from).collect::<Vec<_>>();
        let names = |names: &[&str]| names.iter().map(ToString::to_string).collect::<Vec<_>>();
        let replaced = paths(&[
            ".tensora-unfinished",
            "a",
            "config.json",
            "new",
            "placed.json",
            "rank_0/.tensora-unfinished",
            "rank_0/old.json",
            "staged",
            "z",
        ]);
        let indexes = names(&["placed.json", "staged"]);
        let stale = stale(&replaced, &names(&["new"]), &indexes, |name| {
            name == Path::new("staged")
        });
        let expected = ["config.json", "rank_0/old.json", "staged", "a", "z"];
        assert_eq!(stale, expected.map(Path::new));
    }

    #[test]
    fn many_files_are_replaced_by_many() {
        let names = |from: u32| (from..from + 60_000).map(|number| format!("tensor.data_{number}"));
        let replaced: Vec<PathBuf> = names(0).map(PathBuf::from).collect();
        let data: Vec<String> = names(30_000).collect();
        let begun = Instant::now();
        let stale = stale(&replaced, &data, &[], |_| false);
        assert_eq!(stale.len(), 30_000);
        // Each with each would take a minute.
        let elapsed = begun.elapsed();
        assert!(elapsed < Duration::from_secs(5), "{elapsed:?}");
    }
}

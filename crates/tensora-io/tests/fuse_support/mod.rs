//! A file system of the test's own whose reads fail, fall short, or take their time as a test says: what no
//! wrapper around a backend can do to a ring.
//!
//! It is served by a process of its own. In the process that reads, the server would wait for memory that is
//! locked by a page fault which waits for the server; and a process that is killed while it waits for itself
//! never ends.
#![cfg(all(feature = "testing", target_os = "linux", not(tensora_portable)))]
// Each test uses a part of it.
#![allow(dead_code, clippy::unwrap_used)]

use std::ffi::{CString, OsStr};
use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant, UNIX_EPOCH};

use fuser::{
    Config, Errno, FileAttr, FileHandle, FileType, Filesystem, FopenFlags, Generation, INodeNo,
    LockOwner, MountOption, OpenFlags, ReplyAttr, ReplyData, ReplyEntry, ReplyOpen, Request,
};
use rustix::mount::{MountFlags, UnmountFlags};
use tempfile::TempDir;
use tensora_io::SourceFile;
use tensora_io::testing::skip;

/// Where the process that serves finds who it serves; set in no other.
const SERVER: &str = "TENSORA_TEST_FUSE_SERVER";
/// Nothing about a file is remembered: a change shows at once.
const FORGET: Duration = Duration::ZERO;
/// Longer than anything takes here that does not hang.
const LONG: Duration = Duration::from_secs(60);
/// Number of the first file; 1 is the directory.
const FIRST_INODE: u64 = 2;

/// Whether reads go through the page cache of the kernel.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Caching {
    /// They do, a page or more at a time.
    Cached,
    /// They come as they were made, and so do their answers, also short ones. Such files cannot be mapped.
    Uncached,
    /// As [`Cached`](Self::Cached), seen through an overlay: rings, which keep off files that are plainly on FUSE,
    /// read these in the background.
    Overlaid,
    /// As [`Uncached`](Self::Uncached), seen through an overlay: short answers reach rings.
    OverlaidUncached,
}

impl Caching {
    pub(crate) const ALL: [Self; 4] = [
        Self::Cached,
        Self::Uncached,
        Self::Overlaid,
        Self::OverlaidUncached,
    ];

    pub(crate) fn is_cached(self) -> bool {
        matches!(self, Self::Cached | Self::Overlaid)
    }

    fn is_overlaid(self) -> bool {
        matches!(self, Self::Overlaid | Self::OverlaidUncached)
    }

    fn name(self) -> &'static str {
        match self {
            Self::Cached => "cached",
            Self::Uncached => "uncached",
            Self::Overlaid => "overlaid",
            Self::OverlaidUncached => "overlaid-uncached",
        }
    }

    fn of_name(name: &str) -> Self {
        Self::ALL
            .into_iter()
            .find(|caching| caching.name() == name)
            .unwrap()
    }
}

/// How reads are answered.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Plan {
    /// Those of this file that cover this byte fail with this error number.
    pub(crate) error: Option<(u64, u64, u64)>,
    /// How long that takes, in microseconds.
    pub(crate) error_delay_us: u64,
    /// Answers fall short at random, to at least so many bytes, and to a multiple of the second number.
    pub(crate) short: Option<(u64, u64)>,
    /// All others take so long, in microseconds, and up to so much longer.
    pub(crate) delay_us: u64,
    pub(crate) jitter_us: u64,
    /// Those at this offset are answered at once.
    pub(crate) prompt: Option<u64>,
    /// Once the first byte is asked for, or so many reads have been, the first file has this length.
    pub(crate) shrink: Option<(u64, u64, u64)>,
    /// The first so many fail with this error number, whichever they are.
    pub(crate) transient: Option<(u64, u64)>,
}

impl Plan {
    fn encode(&self) -> String {
        let pair = |pair: Option<(u64, u64)>| pair.map(|(a, b)| (a, b, 0));
        [
            self.error,
            Some((self.error_delay_us, self.delay_us, self.jitter_us)),
            pair(self.short),
            pair(self.prompt.map(|offset| (offset, 0))),
            self.shrink,
            pair(self.transient),
        ]
        .map(|field| field.map_or("- - -".to_owned(), |(a, b, c)| format!("{a} {b} {c}")))
        .join(" ")
    }

    fn decode(text: &str) -> Self {
        let numbers: Vec<Option<u64>> = text.split(' ').map(|word| word.parse().ok()).collect();
        let triple = |number: usize| {
            let [a, b, c] = [0, 1, 2].map(|place| numbers[3 * number + place]);
            Some((a?, b?, c?))
        };
        let (error_delay_us, delay_us, jitter_us) = triple(1).unwrap();
        Self {
            error: triple(0),
            error_delay_us,
            short: triple(2).map(|(least, multiple, _)| (least, multiple)),
            delay_us,
            jitter_us,
            prompt: triple(3).map(|(offset, ..)| offset),
            shrink: triple(4),
            transient: triple(5).map(|(count, errno, _)| (count, errno)),
        }
    }
}

/// A mounted file system with one directory of files. Unmounted when dropped, and when this process ends.
pub(crate) struct Mounted {
    server: Child,
    control: Mutex<Option<BufReader<UnixStream>>>,
    files: PathBuf,
    // Removed after everything was unmounted.
    _directory: TempDir,
    contents: Vec<Vec<u8>>,
}

/// Mounts files of these lengths, or skips the test where that cannot be done.
pub(crate) fn mount(what: &str, caching: Caching, lens: &[usize]) -> Option<Mounted> {
    let directory = tempfile::tempdir().unwrap();
    let socket = tempfile::tempdir().unwrap();
    let socket_path = socket.path().join("control");
    for name in ["served", "empty", "overlaid"] {
        std::fs::create_dir(directory.path().join(name)).unwrap();
    }
    let listener = UnixListener::bind(&socket_path).unwrap();
    let lens_text: Vec<_> = lens.iter().map(ToString::to_string).collect();
    let server = Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "fuse_support::serve", "--ignored", "--nocapture"])
        .env(
            SERVER,
            format!(
                "{}\n{}\n{}\n{}",
                socket_path.display(),
                directory.path().display(),
                caching.name(),
                lens_text.join(" ")
            ),
        )
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    let (stream, _) = listener.accept().unwrap();
    let mut mounted = Mounted {
        server,
        control: Mutex::new(Some(BufReader::new(stream))),
        files: directory.path().join(match caching.is_overlaid() {
            false => "served",
            true => "overlaid",
        }),
        _directory: directory,
        contents: lens
            .iter()
            .enumerate()
            .map(|(number, &len)| content(number, len))
            .collect(),
    };
    let answer = mounted.ask("mounted?");
    if answer == "yes" {
        return Some(mounted);
    }
    mounted.end();
    skip(&format!(
        "{what}: no FUSE file system can be mounted here: {answer}"
    ));
    None
}

/// Bytes in which no two places are alike, none of them 0.
fn content(number: usize, len: usize) -> Vec<u8> {
    let mut state = 0x9E37_79B9_7F4A_7C15_u64 ^ number as u64;
    std::iter::repeat_with(|| {
        // xorshift64*
        state ^= state >> 12;
        state ^= state << 25;
        state ^= state >> 27;
        state.wrapping_mul(0x2545_F491_4F6C_DD1D).to_be_bytes()[0] | 1
    })
    .take(len)
    .collect()
}

impl Mounted {
    fn ask(&self, question: &str) -> String {
        let mut control = self.control.lock().unwrap();
        let control = control.as_mut().unwrap();
        writeln!(control.get_mut(), "{question}").unwrap();
        let mut answer = String::new();
        control.read_line(&mut answer).unwrap();
        assert!(!answer.is_empty(), "the server has ended");
        answer.trim_end().to_owned()
    }

    /// From now on, reads are answered so, and the files have their own lengths again.
    pub(crate) fn answer(&self, plan: Plan) {
        self.ask(&format!("plan {}", plan.encode()));
    }

    pub(crate) fn path(&self, file: usize) -> PathBuf {
        self.files.join(format!("data-{file}"))
    }

    pub(crate) fn open(&self, file: usize) -> SourceFile {
        SourceFile::open(self.path(file)).unwrap()
    }

    pub(crate) fn content(&self, file: usize) -> &[u8] {
        &self.contents[file]
    }

    /// Reads asked for and not answered: while there are any, somebody waits for data, or should.
    pub(crate) fn unanswered(&self) -> u64 {
        self.ask("unanswered?").parse().unwrap()
    }

    /// Waits until so many reads are unanswered.
    pub(crate) fn wait_for_unanswered(&self, least: u64) {
        let begin = Instant::now();
        while self.unanswered() < least {
            assert!(begin.elapsed() < LONG, "never {least} reads at once");
            std::thread::sleep(Duration::from_millis(1));
        }
    }

    /// Unmounts and waits for the server's end.
    fn end(&mut self) {
        drop(self.control.get_mut().unwrap().take());
        let _ = self.server.wait();
    }
}

impl Drop for Mounted {
    fn drop(&mut self) {
        self.end();
    }
}

// ---- the server ----

/// The process that serves. It ends with the one that it serves.
#[test]
#[ignore = "serves the files of the other tests, which start it"]
fn serve() {
    let Ok(arguments) = std::env::var(SERVER) else {
        return;
    };
    let [socket, directory, caching, lens] = arguments
        .split('\n')
        .collect::<Vec<_>>()
        .try_into()
        .unwrap();
    let caching = Caching::of_name(caching);
    let files = lens
        .split_whitespace()
        .enumerate()
        .map(|(number, len)| {
            let content = content(number, len.parse().unwrap());
            File {
                len: AtomicU64::new(content.len() as u64),
                content,
            }
        })
        .collect();
    let state = Arc::new(State {
        files,
        is_cached: caching.is_cached(),
        plan: Mutex::default(),
        asked: AtomicU64::new(0),
        open: AtomicU64::new(0),
    });
    let control = UnixStream::connect(socket).unwrap();
    let mut config = Config::default();
    config.mount_options = vec![MountOption::RO, MountOption::FSName("tensora-test".into())];
    let directory = Path::new(directory);
    let served = directory.join("served");
    let session = fuser::spawn_mount(Served(Arc::clone(&state)), &served, &config);
    let overlaid = directory.join("overlaid");
    let mounted = match &session {
        Err(error) => error.to_string().replace('\n', " "),
        Ok(_) if caching.is_overlaid() => match overlay(directory, &overlaid) {
            Ok(()) => "yes".to_owned(),
            Err(errno) => format!("an overlay: {errno}"),
        },
        Ok(_) => "yes".to_owned(),
    };
    let mut answers = control.try_clone().unwrap();
    for line in BufReader::new(control).lines().map_while(Result::ok) {
        let answer = match line.as_str() {
            "mounted?" => mounted.clone(),
            "unanswered?" => state.open.load(Ordering::SeqCst).to_string(),
            plan => {
                state.obey(Plan::decode(plan.strip_prefix("plan ").unwrap()));
                "yes".to_owned()
            }
        };
        if writeln!(answers, "{answer}").is_err() {
            break;
        }
    }
    // Whoever still has a file open shall not keep the mounts. What is not mounted is no matter.
    for mount_point in [overlaid, served] {
        let _ = rustix::mount::unmount(&mount_point, UnmountFlags::DETACH);
    }
    drop(session);
}

/// Shows what is served, and nothing else, once more.
fn overlay(directory: &Path, at: &Path) -> rustix::io::Result<()> {
    let layers = ["served", "empty"].map(|name| directory.join(name).display().to_string());
    let options = CString::new(format!("lowerdir={}", layers.join(":"))).unwrap();
    let flags = MountFlags::RDONLY;
    rustix::mount::mount("overlay", at, "overlay", flags, options.as_c_str())
}

struct File {
    content: Vec<u8>,
    /// Its length, which a plan may change.
    len: AtomicU64,
}

struct State {
    files: Vec<File>,
    is_cached: bool,
    plan: Mutex<Plan>,
    /// Reads asked for since the plan was made.
    asked: AtomicU64,
    /// Asked for and not answered.
    open: AtomicU64,
}

impl State {
    fn obey(&self, plan: Plan) {
        for file in &self.files {
            file.len.store(file.content.len() as u64, Ordering::SeqCst);
        }
        *self.plan.lock().unwrap() = plan;
        self.asked.store(0, Ordering::SeqCst);
    }
}

/// Numbers that look random and follow from others.
fn mix(number: u64) -> u64 {
    let mixed = (number ^ 0x9E37_79B9_7F4A_7C15).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    (mixed ^ (mixed >> 29)).wrapping_mul(0x94D0_49BB_1331_11EB) >> 32
}

struct Served(Arc<State>);

impl Served {
    fn attributes(&self, inode: INodeNo) -> Option<FileAttr> {
        let directory = inode == INodeNo::ROOT;
        let len = match directory {
            true => 0,
            false => self.file(inode)?.1.len.load(Ordering::SeqCst),
        };
        Some(FileAttr {
            ino: inode,
            size: len,
            blocks: len.div_ceil(512),
            atime: UNIX_EPOCH,
            mtime: UNIX_EPOCH,
            ctime: UNIX_EPOCH,
            crtime: UNIX_EPOCH,
            kind: match directory {
                true => FileType::Directory,
                false => FileType::RegularFile,
            },
            perm: if directory { 0o755 } else { 0o644 },
            nlink: 1,
            uid: rustix::process::getuid().as_raw(),
            gid: rustix::process::getgid().as_raw(),
            rdev: 0,
            blksize: 4096,
            flags: 0,
        })
    }

    fn file(&self, inode: INodeNo) -> Option<(usize, &File)> {
        let number = usize::try_from(inode.0.checked_sub(FIRST_INODE)?).ok()?;
        Some((number, self.0.files.get(number)?))
    }
}

impl Filesystem for Served {
    fn lookup(&self, _: &Request, _: INodeNo, name: &OsStr, reply: ReplyEntry) {
        let number = name.to_str().and_then(|name| name.strip_prefix("data-"));
        let number = number.and_then(|number| number.parse::<u64>().ok());
        let inode = number.map(|number| INodeNo(number + FIRST_INODE));
        match inode.and_then(|inode| self.attributes(inode)) {
            Some(attributes) => reply.entry(&FORGET, &attributes, Generation(0)),
            None => reply.error(Errno::ENOENT),
        }
    }

    fn getattr(&self, _: &Request, inode: INodeNo, _: Option<FileHandle>, reply: ReplyAttr) {
        match self.attributes(inode) {
            Some(attributes) => reply.attr(&FORGET, &attributes),
            None => reply.error(Errno::ENOENT),
        }
    }

    fn open(&self, _: &Request, _: INodeNo, _: OpenFlags, reply: ReplyOpen) {
        let flags = match self.0.is_cached {
            true => FopenFlags::empty(),
            false => FopenFlags::FOPEN_DIRECT_IO,
        };
        reply.opened(FileHandle(0), flags);
    }

    fn read(
        &self,
        _: &Request,
        inode: INodeNo,
        _: FileHandle,
        offset: u64,
        size: u32,
        _: OpenFlags,
        _: Option<LockOwner>,
        reply: ReplyData,
    ) {
        let Some((file, _)) = self.file(inode) else {
            return reply.error(Errno::ENOENT);
        };
        let state = Arc::clone(&self.0);
        state.open.fetch_add(1, Ordering::SeqCst);
        let number = state.asked.fetch_add(1, Ordering::SeqCst);
        let plan = *state.plan.lock().unwrap();
        let asked = offset..offset + u64::from(size);
        if let Some((byte, after, len)) = plan.shrink
            && (asked.contains(&byte) || number >= after)
        {
            state.files[0].len.store(len, Ordering::SeqCst);
        }
        let device_error = plan
            .error
            .filter(|(of, byte, _)| *of == file as u64 && asked.contains(byte))
            .map(|(.., errno)| errno);
        let transient = plan
            .transient
            .filter(|(count, _)| number < *count)
            .map(|(_, errno)| errno);
        let fails = device_error.or(transient);
        let mut bytes = u64::from(size);
        if let Some((least, multiple)) = plan.short {
            let shorter = (mix(offset ^ (number << 32)) % bytes.max(1)).max(least);
            bytes = bytes.min((shorter - shorter % multiple).max(multiple));
        }
        let delay_us = match fails {
            Some(_) => plan.error_delay_us,
            None if plan.prompt == Some(offset) => 0,
            None => plan.delay_us + mix(offset) % (plan.jitter_us + 1),
        };
        let send = move || {
            let File { content, len, .. } = &state.files[file];
            let len = len.load(Ordering::SeqCst);
            let end = len.min(offset + bytes);
            let range = usize::try_from(offset.min(end)).unwrap()..usize::try_from(end).unwrap();
            // Before the answer: whoever has it must not find it open.
            state.open.fetch_sub(1, Ordering::SeqCst);
            match fails {
                Some(errno) => {
                    reply.error(Errno::from_i32(i32::try_from(errno).unwrap()));
                }
                None => reply.data(&content[range]),
            }
        };
        if delay_us == 0 {
            return send();
        }
        // On a thread of its own, so that others are served meanwhile, and overtake it.
        std::thread::spawn(move || {
            std::thread::sleep(Duration::from_micros(delay_us));
            send();
        });
    }
}

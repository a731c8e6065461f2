//! The table of mounts, `/proc/self/mountinfo`.

use super::read_text;

/// One line of the table: a file system, or a part of one, and the place where it is seen.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Mount {
    /// Number of this mount, as `statx` reports it for a file.
    pub(crate) id: u64,
    /// Device number of the file system, major and minor.
    pub(crate) device: (u32, u32),
    /// The directory of the file system that is seen here.
    pub(crate) root: String,
    /// Where it is seen.
    pub(crate) point: String,
    /// `ext4`, `fuse.sshfs`, `virtiofs`, …
    pub(crate) file_system: String,
    /// The device or server that was mounted; free text for some file systems.
    pub(crate) source: String,
    /// Options of the file system as a whole; for a control group, its controllers.
    pub(crate) super_options: String,
}

/// All mounts that this process sees, in the order in which they were made. Empty when unreadable.
pub(crate) fn mounts() -> Vec<Mount> {
    read_text("/proc/self/mountinfo")
        .map(|text| parse(&text))
        .unwrap_or_default()
}

fn parse(text: &str) -> Vec<Mount> {
    text.lines().filter_map(parse_line).collect()
}

fn parse_line(line: &str) -> Option<Mount> {
    // Between the fixed fields stands any number of optional ones, closed by a lone hyphen. Spaces
    // inside a field are escaped, but a field may be empty: split at every single space.
    let mut fields = line.split(' ');
    let id = fields.next()?.parse().ok()?;
    let _parent = fields.next()?;
    let (major, minor) = fields.next()?.split_once(':')?;
    let root = unescape(fields.next()?);
    let point = unescape(fields.next()?);
    fields.by_ref().skip(1).find(|field| *field == "-")?;
    Some(Mount {
        id,
        device: (major.parse().ok()?, minor.parse().ok()?),
        root,
        point,
        file_system: unescape(fields.next()?),
        source: unescape(fields.next()?),
        super_options: fields.next().unwrap_or_default().to_owned(),
    })
}

/// Undoes the escapes of the kernel: a backslash and three octal digits stand for one byte.
fn unescape(field: &str) -> String {
    let mut bytes = Vec::with_capacity(field.len());
    let mut rest = field.as_bytes();
    while let Some((&first, tail)) = rest.split_first() {
        let escaped = (first == b'\\')
            .then(|| tail.split_at_checked(3))
            .flatten()
            .and_then(|(digits, after)| Some((octal_byte(digits)?, after)));
        let (byte, after) = escaped.unwrap_or((first, tail));
        bytes.push(byte);
        rest = after;
    }
    String::from_utf8_lossy(&bytes).into_owned()
}

fn octal_byte(digits: &[u8]) -> Option<u8> {
    digits.iter().try_fold(0u8, |byte, digit| {
        let value = digit.checked_sub(b'0').filter(|&value| value < 8)?;
        byte.checked_mul(8)?.checked_add(value)
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const SAMPLE: &str = "\
22 27 0:21 / /proc rw,relatime - proc proc rw
36 35 98:0 /mnt1 /mnt2 rw,noatime master:1 shared:7 - ext3 /dev/root rw,errors=continue
41 27 0:44 /models /my\\040models ro - fuse.sshfs user@host:/a\\134b rw,user_id=0
42 27 0:45 / /empty rw -  tmpfs  rw
50 27 0:46 / /models rw,relatime - virtiofs models rw
";

    #[test]
    fn reads_every_field() {
        let mounts = parse(SAMPLE);
        assert_eq!(
            mounts[1],
            Mount {
                id: 36,
                device: (98, 0),
                root: "/mnt1".to_owned(),
                point: "/mnt2".to_owned(),
                file_system: "ext3".to_owned(),
                source: "/dev/root".to_owned(),
                super_options: "rw,errors=continue".to_owned(),
            }
        );
        assert_eq!(mounts[2].point, "/my models");
        assert_eq!(mounts[2].source, r"user@host:/a\b");
        assert_eq!(mounts[2].file_system, "fuse.sshfs");
    }

    #[test]
    fn an_empty_field_is_a_field() {
        let mounts = parse("42 27 0:45 / /empty rw - tmpfs  rw,size=4k\n");
        assert_eq!(mounts[0].source, "");
        assert_eq!(mounts[0].super_options, "rw,size=4k");
    }

    #[test]
    fn what_is_malformed_is_left_out_and_the_rest_kept() {
        let text = format!(
            "nonsense\n1 2 3\n1 2 x:y / / rw - ext4 a b\n1 2 8:1 / / rw ext4 a b\n{SAMPLE}36 35 98"
        );
        assert_eq!(parse(&text), parse(SAMPLE));
    }

    #[test]
    fn odd_escapes_stay_as_they_are() {
        assert_eq!(unescape(r"a\040b\011c\134"), "a b\tc\\");
        assert_eq!(unescape(r"\04"), r"\04");
        assert_eq!(unescape(r"\999\"), r"\999\");
        assert_eq!(unescape(r"\+07"), r"\+07");
        assert_eq!(unescape(r"\777"), r"\777");
        assert_eq!(unescape(r"\303\244"), "ä");
    }

    #[test]
    fn this_process_has_a_root() {
        assert!(mounts().iter().any(|mount| mount.point == "/"));
    }

    proptest! {
        #[test]
        fn never_panics(text in any::<String>(), line in "[0-9 :/a-]{0,60}") {
            parse(&text);
            parse(&line);
            unescape(&text);
        }
    }
}

use std::fmt;

/// A number of bytes as a person writes it: `512 bytes`, `1 MiB`, `15.26 GiB`.
#[derive(Clone, Copy)]
pub(crate) struct Bytes(pub(crate) u64);

impl fmt::Display for Bytes {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        const UNITS: [(&str, u32); 4] = [("TiB", 40), ("GiB", 30), ("MiB", 20), ("KiB", 10)];
        let Some((unit, shift)) = UNITS.into_iter().find(|(_, shift)| self.0 >> shift > 0) else {
            return match self.0 {
                1 => f.write_str("1 byte"),
                bytes => write!(f, "{bytes} bytes"),
            };
        };
        // Hundredths in integers: floats would round 2^64 - 1 differently from what it is.
        let hundredths = (u128::from(self.0) * 100 + (1 << (shift - 1))) >> shift;
        let (whole, part) = (hundredths / 100, hundredths % 100);
        match part {
            0 => write!(f, "{whole} {unit}"),
            _ if part % 10 == 0 => write!(f, "{whole}.{} {unit}", part / 10),
            _ => write!(f, "{whole}.{part:02} {unit}"),
        }
    }
}

/// A count with its noun: `1 shard`, `5 shards`.
pub(crate) fn count(number: u64, noun: &str) -> String {
    match number {
        1 => format!("1 {noun}"),
        _ => format!("{number} {noun}s"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bytes_read_like_a_person_wrote_them() {
        for (bytes, text) in [
            (0, "0 bytes"),
            (1, "1 byte"),
            (1023, "1023 bytes"),
            (1024, "1 KiB"),
            (1536, "1.5 KiB"),
            (4 << 20, "4 MiB"),
            (4_000_000_000, "3.73 GiB"),
            ((1 << 30) + (1 << 24), "1.02 GiB"),
            (u64::MAX, "16777216 TiB"),
        ] {
            assert_eq!(Bytes(bytes).to_string(), text);
        }
    }

    #[test]
    fn one_is_singular() {
        assert_eq!(count(1, "ring"), "1 ring");
        assert_eq!(count(0, "ring"), "0 rings");
        assert_eq!(count(2, "ring"), "2 rings");
    }
}

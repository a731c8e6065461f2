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

/// Bytes per second as a device's label has it: `2.4 GB/s`, `620 MB/s`, by 1000.
#[derive(Clone, Copy)]
pub(crate) struct Rate(pub(crate) u64);

impl fmt::Display for Rate {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        // What rounds to 1 GB/s is not 1000 MB/s.
        if self.0 < 999_500_000 {
            return write!(f, "{} MB/s", (self.0 + 500_000) / 1_000_000);
        }
        let tenths = (u128::from(self.0) + 50_000_000) / 100_000_000;
        write!(f, "{}.{} GB/s", tenths / 10, tenths % 10)
    }
}

/// A round decimal figure, and the same in the unit of all other sizes: `4 GB (3.73 GiB)`.
pub(crate) fn gigabytes(bytes: u64) -> String {
    format!("{} GB ({})", bytes / 1_000_000_000, Bytes(bytes))
}

/// Microseconds as seconds: `0.41 s`, `0.014 s`.
#[derive(Clone, Copy)]
pub(crate) struct Seconds(pub(crate) u128);

impl fmt::Display for Seconds {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let ms = (self.0 + 500) / 1000;
        if ms < 100 {
            return write!(f, "0.{ms:03} s");
        }
        let hundredths = (self.0 + 5000) / 10_000;
        write!(f, "{}.{:02} s", hundredths / 100, hundredths % 100)
    }
}

/// The day in UTC, `2026-11-23`; `None` for seconds that are no date.
pub(crate) fn date(unix_s: u64) -> Option<String> {
    let timestamp = jiff::Timestamp::from_second(i64::try_from(unix_s).ok()?).ok()?;
    let day = jiff::tz::TimeZone::UTC.to_datetime(timestamp).date();
    Some(day.to_string())
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
    fn rates_and_times_have_as_many_digits_as_mean_something() {
        for (rate, text) in [
            (0, "0 MB/s"),
            (620_400_000, "620 MB/s"),
            (999_499_999, "999 MB/s"),
            (999_500_000, "1.0 GB/s"),
            (2_449_999_999, "2.4 GB/s"),
            (108_280_000_000, "108.3 GB/s"),
        ] {
            assert_eq!(Rate(rate).to_string(), text);
        }
        for (us, text) in [
            (499, "0.000 s"),
            (13_880, "0.014 s"),
            (99_500, "0.10 s"),
            (738_000, "0.74 s"),
            (12_345_678, "12.35 s"),
        ] {
            assert_eq!(Seconds(us).to_string(), text);
        }
    }

    #[test]
    fn days_are_those_of_the_calendar() {
        assert_eq!(date(0).as_deref(), Some("1970-01-01"));
        assert_eq!(date(1_709_208_000).as_deref(), Some("2024-02-29"));
        assert_eq!(date(1_795_478_399).as_deref(), Some("2026-11-23"));
        assert_eq!(date(1_795_478_400).as_deref(), Some("2026-11-24"));
        assert_eq!(date(u64::MAX), None);
    }

    #[test]
    fn one_is_singular() {
        assert_eq!(count(1, "ring"), "1 ring");
        assert_eq!(count(0, "ring"), "0 rings");
        assert_eq!(count(2, "ring"), "2 rings");
    }
}

//! Numbers as people write and read them.

/// Binary units, largest first.
const UNITS: [(&str, u32); 4] = [("TiB", 40), ("GiB", 30), ("MiB", 20), ("KiB", 10)];

/// Three significant digits with a binary unit: `1.40 GiB`, `512 B`.
pub(crate) fn size(bytes: u64) -> String {
    let Some((unit, shift)) = UNITS.into_iter().find(|(_, shift)| bytes >> shift > 0) else {
        return format!("{bytes} B");
    };
    #[allow(clippy::cast_precision_loss)]
    let value = bytes as f64 / (1u64 << shift) as f64;
    format!("{} {unit}", three_digits(value))
}

/// A size with the exact number behind it: `1.40 GiB (1,503,264,768 bytes)`.
pub(crate) fn size_exactly(bytes: u64) -> String {
    match bytes {
        1 => "1 byte".to_owned(),
        0..1024 => format!("{bytes} bytes"),
        _ => format!("{} ({} bytes)", size(bytes), grouped(bytes)),
    }
}

/// `2.35 GiB/s`.
pub(crate) fn rate(bytes_per_second: f64) -> String {
    #[allow(clippy::cast_possible_truncation, clippy::cast_sign_loss)]
    let bytes = bytes_per_second as u64;
    format!("{}/s", size(bytes))
}

/// Digits in groups of three: `1,503,264,768`.
pub(crate) fn grouped(number: u64) -> String {
    let digits = number.to_string();
    let mut text = String::with_capacity(digits.len() * 4 / 3);
    for (place, digit) in digits.chars().enumerate() {
        if place > 0 && (digits.len() - place).is_multiple_of(3) {
            text.push(',');
        }
        text.push(digit);
    }
    text
}

/// A count with its noun: `1 file`, `5 files`, `18,867 tensors`.
pub(crate) fn count(number: u64, noun: &str) -> String {
    let plural = if number == 1 { "" } else { "s" };
    format!("{} {noun}{plural}", grouped(number))
}

/// `752 M`, `8.19 B`: how models are named after their parameters. Below a million, the number itself.
pub(crate) fn parameters(number: u64) -> String {
    #[allow(clippy::cast_precision_loss)]
    let value = number as f64;
    match number {
        0..1_000_000 => grouped(number),
        1_000_000..999_500_000 => format!("{} M", three_digits(value / 1e6)),
        _ => format!("{} B", three_digits(value / 1e9)),
    }
}

/// `412 µs`, `12.3 ms`, `3.42 s`, `2 min 5 s`.
pub(crate) fn duration(seconds: f64) -> String {
    if seconds < 0.999_5e-3 {
        format!("{} µs", three_digits(seconds * 1e6))
    } else if seconds < 0.999_5 {
        format!("{} ms", three_digits(seconds * 1e3))
    } else if seconds < 99.95 {
        format!("{} s", three_digits(seconds))
    } else {
        #[allow(clippy::cast_possible_truncation, clippy::cast_sign_loss)]
        let whole = seconds.round() as u64;
        format!("{} min {} s", whole / 60, whole % 60)
    }
}

/// A share in per cent; what is neither nothing nor all never reads as if it were.
pub(crate) fn share(part: u64, whole: u64) -> String {
    #[allow(clippy::cast_precision_loss)]
    let percent = part as f64 * 100.0 / whole.max(1) as f64;
    if part > 0 && percent < 1.0 {
        "under 1 %".to_owned()
    } else if part < whole && percent > 99.0 {
        "over 99 %".to_owned()
    } else {
        format!("{percent:.0} %")
    }
}

fn three_digits(value: f64) -> String {
    if value < 9.995 {
        format!("{value:.2}")
    } else if value < 99.95 {
        format!("{value:.1}")
    } else {
        format!("{value:.0}")
    }
}

/// Reads a size in bytes: a number, a fraction if a unit follows, and a unit. `KiB` and the bare
/// `K` count by 1024, `KB` by 1000; letter case does not matter.
pub(crate) fn parse_size(text: &str) -> Result<u64, String> {
    let help = || {
        format!("{text:?} is no size: write bytes, or a number with a unit, such as 1MiB or 1.5GB")
    };
    let text = text.trim();
    let digits = text
        .find(|c: char| !c.is_ascii_digit() && c != '.')
        .unwrap_or(text.len());
    let (number, unit) = text.split_at(digits);
    let unit_bytes: u128 = match unit.trim_start().to_ascii_lowercase().as_str() {
        "" | "b" => 1,
        "k" | "kib" => 1 << 10,
        "m" | "mib" => 1 << 20,
        "g" | "gib" => 1 << 30,
        "t" | "tib" => 1 << 40,
        "kb" => 1_000,
        "mb" => 1_000_000,
        "gb" => 1_000_000_000,
        "tb" => 1_000_000_000_000,
        _ => return Err(help()),
    };
    let (whole, fraction) = number.split_once('.').unwrap_or((number, ""));
    // Twelve places express a byte of a tebibyte, and keep the product far inside 128 bits.
    let malformed = whole.is_empty()
        || fraction.contains('.')
        || fraction.len() > 12
        || number.ends_with('.')
        || (!fraction.is_empty() && unit_bytes == 1);
    if malformed {
        return Err(help());
    }
    let too_large = || format!("{text:?} is more than 64 bits can count in bytes");
    let scale = (0..fraction.len()).fold(1u128, |scale, _| scale * 10);
    let fraction: u128 = match fraction {
        "" => 0,
        digits => digits.parse().map_err(|_| help())?,
    };
    let whole: u64 = whole.parse().map_err(|_| too_large())?;
    let bytes = u128::from(whole) * unit_bytes + fraction * unit_bytes / scale;
    u64::try_from(bytes).map_err(|_| too_large())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_read_as_they_are_written() {
        for (text, bytes) in [
            ("0", 0),
            ("4096", 4096),
            ("17b", 17),
            ("1MiB", 1 << 20),
            ("1 mib", 1 << 20),
            ("512K", 512 << 10),
            ("1.5GiB", 3 << 29),
            ("1.5gb", 1_500_000_000),
            ("0.25m", 1 << 18),
            ("2TB", 2_000_000_000_000),
            ("18446744073709551615", u64::MAX),
        ] {
            assert_eq!(parse_size(text), Ok(bytes), "{text}");
        }
    }

    #[test]
    fn what_is_no_size_is_refused() {
        for text in [
            "",
            "MiB",
            "-1",
            "1.5",
            "1.",
            ".5M",
            "1..2M",
            "1.2.3M",
            "1XiB",
            "1 M B",
            "0x10",
            "1e3",
            "1.0000000000001M",
        ] {
            let error = parse_size(text).unwrap_err();
            assert!(error.contains("1MiB"), "{error}");
        }
        for text in [
            "18446744073709551616",
            "16777216TiB",
            "99999999999999999999999",
        ] {
            let error = parse_size(text).unwrap_err();
            assert!(error.contains("64 bits"), "{error}");
        }
    }

    #[test]
    fn sizes_keep_three_digits() {
        for (bytes, text) in [
            (0, "0 B"),
            (1023, "1023 B"),
            (1024, "1.00 KiB"),
            (10 << 10, "10.0 KiB"),
            (1_503_264_768, "1.40 GiB"),
            (16_381_470_720, "15.3 GiB"),
            (u64::MAX, "16777216 TiB"),
        ] {
            assert_eq!(size(bytes), text);
        }
        assert_eq!(size_exactly(1), "1 byte");
        assert_eq!(size_exactly(1023), "1023 bytes");
        assert_eq!(
            size_exactly(1_503_264_768),
            "1.40 GiB (1,503,264,768 bytes)"
        );
    }

    #[test]
    fn numbers_read_well() {
        for (number, text) in [
            (0, "0"),
            (999, "999"),
            (1000, "1,000"),
            (12_345_678, "12,345,678"),
        ] {
            assert_eq!(grouped(number), text);
        }
        assert_eq!(count(1, "file"), "1 file");
        assert_eq!(count(18_867, "tensor"), "18,867 tensors");
        assert_eq!(parameters(7_168), "7,168");
        assert_eq!(parameters(751_632_384), "752 M");
        assert_eq!(parameters(8_190_735_360), "8.19 B");
        assert_eq!(rate(2.5 * f64::from(1 << 30)), "2.50 GiB/s");
        assert_eq!(rate(f64::INFINITY), "16777216 TiB/s");
    }

    #[test]
    fn durations_choose_their_unit() {
        for (seconds, text) in [
            (0.0, "0.00 µs"),
            (0.000_412, "412 µs"),
            (0.012_34, "12.3 ms"),
            (0.999_6, "1.00 s"),
            (3.419, "3.42 s"),
            (125.2, "2 min 5 s"),
        ] {
            assert_eq!(duration(seconds), text);
        }
    }

    #[test]
    fn shares_do_not_round_to_the_ends() {
        for (part, whole, text) in [
            (0, 0, "0 %"),
            (0, 100, "0 %"),
            (1, 10_000, "under 1 %"),
            (37, 100, "37 %"),
            (9_999, 10_000, "over 99 %"),
            (100, 100, "100 %"),
        ] {
            assert_eq!(share(part, whole), text);
        }
    }
}

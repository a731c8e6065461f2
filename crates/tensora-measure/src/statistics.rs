/// The middle of the values; of an even number, the mean of the two in the middle; `None` without values.
pub fn median(values: impl IntoIterator<Item = f64>) -> Option<f64> {
    let mut values: Vec<_> = values.into_iter().collect();
    values.sort_by(f64::total_cmp);
    let middle = values.len() / 2;
    match values.len() {
        0 => None,
        odd if odd % 2 == 1 => Some(values[middle]),
        _ => Some(f64::midpoint(values[middle - 1], values[middle])),
    }
}

/// The median over the rounds of `numerator ÷ denominator`; each item is one round's pair. A machine that is slow
/// for a round is slow for both.
pub fn median_ratio(rounds: impl IntoIterator<Item = (f64, f64)>) -> Option<f64> {
    median(
        rounds
            .into_iter()
            .map(|(numerator, denominator)| numerator / denominator),
    )
}

/// The geometric mean, as ratios are averaged; `None` without values.
pub fn geometric_mean(values: impl IntoIterator<Item = f64>) -> Option<f64> {
    let (mut sum, mut count) = (0.0, 0.0);
    for value in values {
        sum += value.ln();
        count += 1.0;
    }
    (count > 0.0).then(|| f64::exp(sum / count))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn medians_are_in_the_middle() {
        assert_eq!(median([]), None);
        assert_eq!(median([3.0, 1.0, 2.0]), Some(2.0));
        assert_eq!(median([4.0, 1.0, 2.0, 3.0]), Some(2.5));
    }

    #[test]
    fn ratios_are_taken_within_a_round() {
        // The machine is ten times slower in the second round; the ratio is what it would be anyway.
        let ratio = median_ratio([(1.1, 1.0), (13.0, 10.0)]).unwrap();
        assert!((ratio - 1.2).abs() < 1e-9, "{ratio}");
    }

    #[test]
    fn a_ratio_and_its_inverse_cancel_out() {
        let mean = geometric_mean([0.5, 2.0, 1.0]).unwrap();
        assert!((mean - 1.0).abs() < 1e-12, "{mean}");
        assert_eq!(geometric_mean([]), None);
    }
}

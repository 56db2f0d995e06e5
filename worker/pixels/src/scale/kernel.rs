//! How much a pixel of the source weighs in one of the scaled image. Distances are in pixels of the source, of which
//! `scale` become one.

use proto::Filter;

/// What is farther away than this weighs nothing.
pub(super) fn radius(filter: Filter, scale: f64) -> f64 {
    match filter {
        Filter::Area if scale > 1.0 => (scale + 1.0) / 2.0,
        Filter::Lanczos3 | Filter::Area => 3.0 * scale.max(1.0),
        Filter::Bilinear => scale.max(1.0),
    }
}

/// Not yet in proportion to those of the other pixels.
pub(super) fn weight(filter: Filter, scale: f64, distance: f64) -> f64 {
    match filter {
        // The part of a pixel that is covered.
        Filter::Area if scale > 1.0 => ((scale + 1.0) / 2.0 - distance.abs()).clamp(0.0, 1.0),
        Filter::Lanczos3 | Filter::Area => lanczos3(distance / scale.max(1.0)),
        Filter::Bilinear => (1.0 - distance.abs() / scale.max(1.0)).max(0.0),
    }
}

/// sinc(x) sinc(x / 3): both sines come from one polynomial, within 1e-10. Two sines of the mathematical library for
/// each weight would be a tenth of all work on a picture.
pub(super) fn lanczos3(x: f64) -> f64 {
    use std::f64::consts::PI;
    /// sin(a) / a by powers of a squared, up to the 14th of a: (-1)^k / (2k + 1)!
    const SINE: [f64; 8] = {
        let (mut terms, mut k) = ([1.0; 8], 1);
        while k < 8 {
            terms[k] = -terms[k - 1] / ((2 * k) * (2 * k + 1)) as f64;
            k += 1;
        }
        terms
    };
    let angle = x.abs() * (PI / 3.0);
    if angle >= PI {
        return 0.0;
    }
    if angle == 0.0 {
        return 1.0;
    }
    let folded = angle.min(PI - angle);
    let square = folded * folded;
    let sine = folded * SINE.iter().rev().fold(0.0, |sum, term| sum * square + term);
    // sin(3a) = 3 sin(a) - 4 sin(a)^3
    let sinc = sine / angle;
    sinc * sinc * (1.0 - 4.0 / 3.0 * sine * sine)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_kernel_is_lanczos_of_three_lobes() {
        use std::f64::consts::PI;
        let sinc = |x: f64| if x == 0.0 { 1.0 } else { (PI * x).sin() / (PI * x) };
        for x in (-3500..=3500).map(|i| f64::from(i) / 1000.0).chain([1e-12, -1e-7, 2.999_999_999]) {
            let wanted = if x.abs() < 3.0 { sinc(x) * sinc(x / 3.0) } else { 0.0 };
            assert!((lanczos3(x) - wanted).abs() < 1e-10, "{x}: {} is not {wanted}", lanczos3(x));
        }
    }
}

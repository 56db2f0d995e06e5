//! Colour profiles (ICC), and PNG's gamma: what a picture's numbers mean if that is not sRGB, for which everybody takes
//! the numbers of a stored picture.

use std::fmt;
use std::sync::Arc;

use moxcms::{ColorProfile, DataColorSpace, Layout, ToneReprCurve, Transform8BitExecutor, TransformOptions};

/// Larger profiles are not read; those of cameras and screens have some kilobytes.
const LARGEST: usize = 4 << 20;
/// Whatever changes no colour by more than this (of 255) is sRGB.
const SAME: u8 = 2;
/// Profiles that are remembered: most pictures have one of a few.
const REMEMBERED: usize = 16;
/// What screens show by themselves: a gamma within is as good as sRGB's curve.
const USUAL_GAMMA: std::ops::RangeInclusive<f32> = 2.0..=2.4;

/// What a picture says of its colours.
#[derive(Debug, Clone, PartialEq)]
pub enum Colours {
    /// An ICC profile, as it is embedded.
    Profile(Vec<u8>),
    /// The exponent by which light grows with the numbers.
    Gamma(f32),
}

/// The conversion of a picture's colours to sRGB.
#[derive(Clone)]
pub struct ToSrgb(Arc<Transform8BitExecutor>);

impl fmt::Debug for ToSrgb {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("ToSrgb")
    }
}

impl ToSrgb {
    /// None: they are sRGB, or nobody can tell: not red, green and blue, or no profile that can be read.
    fn new(colours: &Colours) -> Option<Self> {
        let profile = match colours {
            Colours::Profile(icc) if icc.len() <= LARGEST => ColorProfile::new_from_slice(icc).ok()?,
            Colours::Profile(_) => return None,
            Colours::Gamma(gamma) if USUAL_GAMMA.contains(gamma) => return None,
            Colours::Gamma(gamma) => {
                let curve = ToneReprCurve::Parametric(vec![*gamma]);
                let mut profile = ColorProfile::new_srgb();
                profile.red_trc = Some(curve.clone());
                profile.green_trc = Some(curve.clone());
                profile.blue_trc = Some(curve);
                profile.cicp = None;
                profile
            }
        };
        if profile.color_space != DataColorSpace::Rgb {
            return None;
        }
        let options = TransformOptions { rendering_intent: profile.rendering_intent, ..TransformOptions::default() };
        let transform =
            profile.create_transform_8bit(Layout::Rgb, &ColorProfile::new_srgb(), Layout::Rgb, options).ok()?;
        let this = Self(transform);
        let steps = [0, 51, 102, 153, 204, 255];
        let grid: Vec<u8> =
            steps.iter().flat_map(|&r| steps.iter().flat_map(move |&g| steps.map(|b| [r, g, b]))).flatten().collect();
        let there = this.convert(&grid)?;
        there.iter().zip(&grid).any(|(a, b)| a.abs_diff(*b) > SAME).then_some(this)
    }

    /// RGB, three bytes a pixel.
    pub fn convert(&self, rgb: &[u8]) -> Option<Vec<u8>> {
        let mut srgb = vec![0; rgb.len()];
        self.0.transform(rgb, &mut srgb).ok()?;
        Some(srgb)
    }
}

/// The conversions that one thread remembers.
#[derive(Debug, Default)]
pub struct Conversions(Vec<(Colours, Option<ToSrgb>)>);

impl Conversions {
    /// That of these colours; None: there is nothing to do.
    pub fn of(&mut self, colours: &Colours) -> Option<ToSrgb> {
        if let Some((_, conversion)) = self.0.iter().find(|(known, _)| known == colours) {
            return conversion.clone();
        }
        if self.0.len() >= REMEMBERED {
            self.0.remove(0);
        }
        let conversion = ToSrgb::new(colours);
        self.0.push((colours.clone(), conversion.clone()));
        conversion
    }
}

/// The gamma of a PNG that says nothing better (`sRGB` or `iCCP`) of its colours.
pub fn png_gamma(bytes: &[u8]) -> Option<Colours> {
    let (mut at, mut gamma) = (8, None);
    loop {
        let length = u32::from_be_bytes(bytes.get(at..at + 4)?.try_into().ok()?) as usize;
        match bytes.get(at + 4..at + 8)? {
            b"sRGB" | b"iCCP" => return None,
            b"IDAT" | b"IEND" => return gamma,
            b"gAMA" if length == 4 => {
                let value = u32::from_be_bytes(bytes.get(at + 8..at + 12)?.try_into().ok()?);
                gamma = (value > 0).then(|| Colours::Gamma(100_000.0 / value as f32));
            }
            _ => {}
        }
        at = at.checked_add(length)?.checked_add(12)?;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn profile(of: ColorProfile) -> Colours {
        Colours::Profile(of.encode().expect("a profile of moxcms' own"))
    }

    #[test]
    fn colours_of_other_spaces_become_srgb_and_those_that_are_srgb_or_no_rgb_stay() {
        let mut conversions = Conversions::default();
        let green = |conversion: Option<ToSrgb>| conversion.and_then(|conversion| conversion.convert(&[60, 200, 80]));
        let adobe = green(conversions.of(&profile(ColorProfile::new_adobe_rgb()))).expect("another space");
        assert!(adobe[0] < 20 && adobe[1].abs_diff(201) < 3, "{adobe:?}");
        assert!(green(conversions.of(&profile(ColorProfile::new_display_p3()))).is_some());
        assert!(conversions.of(&profile(ColorProfile::new_srgb())).is_none());
        assert!(conversions.of(&profile(ColorProfile::new_gray_with_gamma(1.0))).is_none());
        assert!(conversions.of(&Colours::Profile(b"no profile".to_vec())).is_none());
        assert_eq!(conversions.0.len(), 5);
        let linear = conversions
            .of(&Colours::Gamma(1.0))
            .and_then(|conversion| conversion.convert(&[0, 55, 255]))
            .expect("linear");
        assert!(linear[0] == 0 && linear[1].abs_diff(128) < 3 && linear[2] == 255, "{linear:?}");
        assert!(conversions.of(&Colours::Gamma(2.2)).is_none());
        for n in 0..100 {
            conversions.of(&Colours::Gamma(3.0 + n as f32));
        }
        assert_eq!(conversions.0.len(), REMEMBERED);
    }

    #[test]
    fn a_gamma_counts_where_nothing_better_is_said() {
        let chunk =
            |name: &[u8; 4], body: &[u8]| [&(body.len() as u32).to_be_bytes(), &name[..], body, &[0; 4]].concat();
        let png = |chunks: &[Vec<u8>]| [b"\x89PNG\r\n\x1a\n".to_vec(), chunks.concat(), chunk(b"IDAT", b"")].concat();
        let gamma = chunk(b"gAMA", &100_000_u32.to_be_bytes());
        let head = chunk(b"IHDR", &[0; 13]);
        assert_eq!(png_gamma(&png(&[head.clone(), gamma.clone()])), Some(Colours::Gamma(1.0)));
        assert_eq!(png_gamma(&png(&[head.clone(), gamma.clone(), chunk(b"sRGB", &[0])])), None);
        assert_eq!(png_gamma(&png(&[head.clone(), chunk(b"iCCP", &[0]), gamma])), None);
        assert_eq!(png_gamma(&png(&[head, chunk(b"gAMA", &[0; 4])])), None);
        assert_eq!(png_gamma(b"\x89PNG\r\n\x1a\n\xff\xff\xff\xffabcd"), None);
    }
}

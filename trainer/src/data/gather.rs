//! Cuts a batch out of images that lie on the device: copies crops, or scales them as the host does, in operations
//! whose number does not grow with that of the samples.

use tch::{Device, Kind, Tensor};

use crate::torch::{Error, Result, device, tensor};

/// So many of a weight's 15 bits are multiplied apart where TF32 computes, whose numbers have 11 significant bits. Bytes
/// and both parts are then exact, and so are their products.
const LOW_BITS: i32 = 7;
/// Scaled at the same time are so many samples, for which a GPU needs some hundred MiB.
const SCALED_AT_ONCE: usize = 64;
/// The areas that are scaled together are made as large as the largest, and that a multiple of this many pixels, so
/// that there are few sizes for which a device wants memory.
const SIZES: i64 = 32;

/// A crop of an image in a slab of pixels: the pixel in row y and column x of the area that is cut out is the
/// `first` + y `row` + x `column`-th one of the slab.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub(crate) struct DeviceCrop {
    /// The slab's number.
    pub slab: usize,
    /// Of the area's upper left corner, or its upper right one if it is flipped.
    pub first: i64,
    /// The image's width.
    pub row: i64,
    /// 1, or -1 if it is flipped.
    pub column: i64,
    /// Of the area: as large as the crop if that is a copy.
    pub height: i64,
    /// As the height.
    pub width: i64,
}

impl DeviceCrop {
    fn numbers(&self, place: usize) -> [i64; 6] {
        [place as i64, self.first, self.row, self.column, self.height, self.width]
    }
}

/// The pixels of a batch, [samples, crop, crop, 3]: samples with a crop are cut on the device out of slabs, each
/// [pixels, 3], the others are sent from `host`, [samples, crop, crop, 3], where they lie in their order.
pub(super) fn gather(slabs: &[Tensor], host: &Tensor, crops: &[Option<DeviceCrop>], device: Device) -> Result<Tensor> {
    let (side, all) = (host.size()[1], crops.len() as i64);
    // Which samples each source has: the slabs, and then the host.
    let mut sources = vec![Vec::new(); slabs.len() + 1];
    for (place, crop) in crops.iter().enumerate() {
        sources[crop.map_or(slabs.len(), |crop| crop.slab)].push((place, crop.unwrap_or_default()));
    }
    let is_scaled = crops.iter().flatten().any(|crop| (crop.height, crop.width) != (side, side));
    let number = |i| sources.iter().flatten().map(move |(place, crop): &(usize, DeviceCrop)| crop.numbers(*place)[i]);
    let numbers: Vec<i64> = (0..6).flat_map(number).collect();
    let numbers = tensor::sent(&Tensor::from_slice(&numbers).f_view([6, all])?, device)?;

    let mut batch: Option<Tensor> = None;
    let mut start = 0;
    for (source, samples) in sources.iter().enumerate() {
        let at_once = if is_scaled && source < slabs.len() { SCALED_AT_ONCE } else { samples.len().max(1) };
        for samples in samples.chunks(at_once) {
            let count = samples.len() as i64;
            let these = numbers.f_narrow(1, start, count)?;
            let pixels = match slabs.get(source) {
                Some(slab) if is_scaled => {
                    let most = |of: fn(&DeviceCrop) -> i64| samples.iter().map(|(_, crop)| of(crop)).max().unwrap_or(1);
                    scaled(slab, &these, side, most(|crop| crop.height), most(|crop| crop.width))?
                }
                Some(slab) => {
                    let along = counted(side, device)?;
                    area(slab, &these, &along.f_view([-1, 1])?, &along)?
                }
                None => host.f_to_device_(device, Kind::Uint8, true, false)?,
            };
            if count == all {
                return Ok(pixels);
            }
            let batch = match &mut batch {
                Some(batch) => batch,
                none => none.insert(Tensor::f_empty([all, side, side, 3], (Kind::Uint8, device))?),
            };
            let _ = batch.f_index_copy_(0, &these.f_select(0, 0)?, &pixels)?;
            start += count;
        }
    }
    batch.ok_or_else(|| Error::Other("a batch without samples".to_owned()))
}

fn counted(to: i64, device: Device) -> Result<Tensor> {
    Ok(Tensor::f_arange(to, (Kind::Int64, device))?)
}

/// One of the numbers of samples, [samples, 1, 1].
fn number(numbers: &Tensor, i: i64) -> Result<Tensor> {
    Ok(numbers.f_select(0, i)?.f_view([-1, 1, 1])?)
}

/// Those rows and columns of each sample's area: [samples, rows, columns, 3], bytes.
fn area(slab: &Tensor, numbers: &Tensor, rows: &Tensor, columns: &Tensor) -> Result<Tensor> {
    let number = |i| number(numbers, i);
    let starts = number(1)?.f_add(&number(2)?.f_mul(rows)?)?;
    let index = starts.f_add(&number(3)?.f_mul(columns)?)?;
    let size = index.size();
    Ok(slab.f_index_select(0, &index.f_view([-1])?)?.f_view([size[0], size[1], size[2], 3])?)
}

/// Each sample's area, of at most `height` x `width` pixels, scaled to side x side: rows first, and rounded to bytes
/// after each direction, as the host does.
fn scaled(slab: &Tensor, numbers: &Tensor, side: i64, height: i64, width: i64) -> Result<Tensor> {
    let (height, width) = ((height + SIZES - 1) / SIZES * SIZES, (width + SIZES - 1) / SIZES * SIZES);
    let (samples, heights, widths) = (numbers.size()[1], number(numbers, 4)?, number(numbers, 5)?);
    // What is outside of a smaller area has no weight: its last row and column again.
    let rows = counted(height, slab.device())?.f_view([-1, 1])?.f_minimum(&heights.f_sub_scalar(1)?)?;
    let columns = counted(width, slab.device())?.f_minimum(&widths.f_sub_scalar(1)?)?;
    let pixels = area(slab, numbers, &rows, &columns)?.f_view([samples, height, width * 3])?.f_to_kind(Kind::Float)?;
    let tf32 = slab.device().is_cuda() && device::allows_tf32()?;
    let rows = weighted(weights(&heights, height, side)?, &pixels, Sums::of(height, side, tf32))?;
    let rows =
        rows.f_view([samples, side, width, 3])?.f_permute([0, 2, 1, 3])?.f_reshape([samples, width, side * 3])?;
    let columns = weighted(weights(&widths, width, side)?, &rows, Sums::of(width, side, tf32))?;
    let scaled = columns.f_view([samples, side, side, 3])?.f_permute([0, 2, 1, 3])?;
    Ok(scaled.f_to_kind(Kind::Uint8)?.f_contiguous()?)
}

/// How sums of bytes with weights are exact, as those of the host are.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Sums {
    /// f32 holds whole numbers below 2^24, as they are where two pixels or fewer become one.
    Whole,
    /// The same where products are of TF32: both parts of the weights are multiplied apart, and added to one sum.
    Parts,
    /// Where sums may be larger: each part has one of its own, which f32 holds unless an area is more than 250 times as
    /// wide as the crop. Their sum is of f64.
    Apart,
}

impl Sums {
    /// Where at most `most` pixels along a direction become `side`.
    fn of(most: i64, side: i64, tf32: bool) -> Self {
        match tf32 {
            _ if most > 2 * side => Self::Apart,
            true => Self::Parts,
            false => Self::Whole,
        }
    }
}

/// The sums of bytes with these weights, as bytes.
fn weighted((weights, one): (Tensor, Tensor), bytes: &Tensor, how: Sums) -> Result<Tensor> {
    let sums = match how {
        Sums::Whole => weights.f_bmm(bytes)?,
        Sums::Parts => {
            let [high, low] = parts(&weights)?;
            low.f_bmm(bytes)?.f_baddbmm(&high, bytes, 1.0, 1.0)?
        }
        Sums::Apart => {
            let [high, low] = parts(&weights)?;
            let (high, low) = (high.f_bmm(bytes)?, low.f_bmm(bytes)?);
            high.f_to_kind(Kind::Double)?.f_add(&low)?
        }
    };
    let bytes = sums.f_add(&one.f_div_scalar(2.0)?)?.f_div(&one)?.f_floor()?.f_clamp(0.0, 255.0)?;
    Ok(bytes.f_to_kind(Kind::Float)?)
}

/// Whole numbers of 15 bits as the sum of two of at most 8 significant bits.
fn parts(weights: &Tensor) -> Result<[Tensor; 2]> {
    let unit = 2.0_f64.powi(LOW_BITS);
    let high = weights.f_div_scalar(unit)?.f_floor()?.f_mul_scalar(unit)?;
    let low = weights.f_sub(&high)?;
    Ok([high, low])
}

/// How much each of `most` pixels along a direction counts in each of `side`, [samples, side, most], where `sizes`
/// ([samples, 1, 1]) of them are scaled: a triangle as wide as the scale requires. These are whole numbers, as the host
/// has them: of the second tensor's parts of one, the power of two with which the largest takes 15 bits.
fn weights(sizes: &Tensor, most: i64, side: i64) -> Result<(Tensor, Tensor)> {
    let middles =
        |count| -> Result<Tensor> { Ok(counted(count, sizes.device())?.f_to_kind(Kind::Double)?.f_add_scalar(0.5)?) };
    let sizes = sizes.f_to_kind(Kind::Double)?;
    let scale = sizes.f_div_scalar(side)?;
    let pixels = middles(most)?;
    let centers = middles(side)?.f_view([-1, 1])?.f_mul(&scale)?;
    let distances = pixels.f_sub(&centers)?.f_abs()?.f_div(&scale.f_clamp_min(1.0)?)?;
    let weights = distances.f_neg()?.f_add_scalar(1.0)?.f_clamp_min(0.0)?.f_mul(&pixels.f_lt_tensor(&sizes)?)?;
    let weights = weights.f_div(&weights.f_sum_dim_intlist([2_i64].as_slice(), true, Kind::Double)?)?;
    let largest = weights.f_amax([1_i64, 2].as_slice(), true)?;
    let bits = largest.f_reciprocal()?.f_mul_scalar(32767.5)?.f_log2()?.f_ceil()?.f_sub_scalar(1)?;
    let one = bits.f_exp2()?;
    let weights = weights.f_mul(&one)?.f_add_scalar(0.5)?.f_floor()?;
    Ok((weights.f_to_kind(Kind::Float)?, one.f_to_kind(Kind::Float)?))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What TF32 has of numbers, if it cuts off the rest: 10 bits behind the first.
    fn cut(numbers: &Tensor) -> Tensor {
        let values = Vec::<f32>::try_from(numbers.flatten(0, -1)).expect("numbers of f32");
        let values: Vec<f32> = values.iter().map(|value| f32::from_bits(value.to_bits() & !0x1fff)).collect();
        Tensor::from_slice(&values).view(numbers.size().as_slice())
    }

    #[test]
    fn weights_in_two_parts_are_exact_in_tf32_and_give_the_same_bytes() {
        let weights = Tensor::arange(1 << 15, (Kind::Float, Device::Cpu));
        assert_ne!(cut(&weights), weights, "as a whole they are not");
        let [high, low] = parts(&weights).expect("numbers");
        assert_eq!(cut(&high), high);
        assert_eq!(cut(&low), low);
        assert_eq!(high + low, weights);

        let numbers = Tensor::arange(2 * 40 * 30, (Kind::Int64, Device::Cpu));
        let bytes = (numbers * 97).remainder(256).to_kind(Kind::Float).view([2, 40, 30]);
        for side in [16, 33, 64] {
            let sizes = Tensor::from_slice(&[40_i64, 23]).view([2, 1, 1]);
            let scaled = |how| {
                let weights = super::weights(&sizes, 40, side).expect("sizes");
                weighted(weights, &bytes, how).expect("shapes agree")
            };
            let whole = scaled(Sums::Whole);
            assert_eq!(whole, scaled(Sums::Parts), "{side}");
            assert_eq!(whole, scaled(Sums::Apart), "{side}");
        }
    }

    #[test]
    fn sums_are_exact_however_many_pixels_become_one() {
        assert_eq!([Sums::of(256, 128, false), Sums::of(256, 128, true)], [Sums::Whole, Sums::Parts]);
        assert_eq!([Sums::of(288, 128, false), Sums::of(288, 128, true)], [Sums::Apart; 2]);
        let (most, side, columns) = (2048, 16, 300);
        let bytes = (Tensor::arange(most * columns, (Kind::Int64, Device::Cpu)) * 7919).remainder(251) + 5;
        let bytes = bytes.to_kind(Kind::Float).view([1, most, columns]);
        for size in [200, 1000, 2048] {
            let sizes = Tensor::from_slice(&[size]).view([1, 1, 1]);
            let (weights, one) = super::weights(&sizes, most, side).expect("sizes");
            let sums = weights.to_kind(Kind::Double).bmm(&bytes.to_kind(Kind::Double));
            assert!(sums.max().double_value(&[]) > f64::from(1 << 24), "{size}: f32 would not hold them");
            let exact = ((sums + &one / 2.0) / &one).floor().clamp(0.0, 255.0).to_kind(Kind::Float);
            assert_eq!(weighted((weights, one), &bytes, Sums::Apart).expect("shapes agree"), exact, "{size}");
        }
    }
}

//! Packs slices while the next ones are dealt.

use std::collections::BTreeMap;
use std::panic::resume_unwind;
use std::sync::mpsc::sync_channel;
use std::thread;

use bytes::Bytes;
use proto::round::Slice;
use proto::slice::SliceWriter;
use tokio::sync::mpsc;

use crate::dealing::Hand;
use crate::error::Error;

/// A slice before it is packed.
pub(super) struct Dealt {
    pub(super) number: u32,
    pub(super) once: bool,
    pub(super) hand: Hand,
}

/// Threads that pack: that takes longer than to deal.
const PACKERS: usize = 2;

/// Runs `deal`, whose slices other threads pack meanwhile; they are sent on in their order, each with its number. Returns
/// what stands for each slice, by its number, and what `deal` returned.
pub(super) fn packed<T>(
    slices: &mpsc::Sender<(u32, Bytes)>,
    deal: impl FnOnce(&mut dyn FnMut(Dealt) -> Result<(), Error>) -> Result<T, Error>,
) -> Result<(BTreeMap<u32, Slice>, T), Error> {
    thread::scope(|scope| {
        let (mut hands, mut packed) = (Vec::new(), Vec::new());
        let mut packers = Vec::new();
        for _ in 0..PACKERS {
            // Slices may be large: none waits for a packer but the one that was dealt last.
            let (hand, dealt) = sync_channel::<Dealt>(0);
            let (done, result) = sync_channel(1);
            // Those that nobody waits for are not packed.
            packers.push(scope.spawn(move || _ = dealt.iter().try_for_each(|dealt| done.send(pack(dealt)))));
            hands.push(hand);
            packed.push(result);
        }
        let sender = scope.spawn(move || {
            let mut done = BTreeMap::new();
            for result in packed.iter().cycle().map_while(|packed| packed.recv().ok()) {
                let (number, slice, bytes) = result?;
                done.insert(number, slice);
                let sent = slices.blocking_send((number, bytes));
                sent.map_err(|_| Error::Local("the upload of slices has ended".to_owned()))?;
            }
            Ok::<_, Error>(done)
        });
        let mut turns = (0..PACKERS).cycle();
        let result = deal(&mut |dealt| {
            let sent = turns.next().and_then(|turn| hands[turn].send(dealt).ok());
            sent.ok_or_else(|| Error::Local("the packing of slices has ended".to_owned()))
        });
        drop(hands);
        packers.into_iter().for_each(|packer| packer.join().unwrap_or_else(|panic| resume_unwind(panic)));
        // What ended the packing ended the dealing, too.
        let done = sender.join().unwrap_or_else(|panic| resume_unwind(panic))?;
        Ok((done, result?))
    })
}

fn pack(Dealt { number, once, mut hand }: Dealt) -> Result<(u32, Slice, Bytes), Error> {
    let mut writer = SliceWriter::new()?;
    hand.shuffled().try_for_each(|(key, synset, tail)| writer.push(key, synset, tail))?;
    let (urls, bytes) = (writer.urls(), Bytes::from(writer.finish()?));
    Ok((number, Slice { urls, sha256: proto::shard::sha256_hex(&bytes), once }, bytes))
}

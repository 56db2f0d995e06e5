//! What is held at once, however large a dataset is.

use super::*;
use crate::gists::INDEXES;

#[test]
fn indexes_of_a_first_sealing_are_read_a_few_at_a_time_with_their_rows() {
    let mut world = World::new(3);
    world.grow(30, 20);
    world.objects.take();
    let sealed = world.seal(1, None, &world.objects).expect("seals");
    let (mut held, mut most, mut read) = (BTreeSet::new(), 0, 0);
    for (key, _) in world.objects.take() {
        if key.contains("/index/") {
            read += u64::from(held.insert(keys::number(&key).expect("a shard")));
        } else if key.contains("/slices/") {
            held.remove(&keys::number(&key).expect("a shard"));
        } else if let Ok((shard, _)) = keys::attempt_of(&key) {
            held.remove(&u64::from(shard));
        }
        most = most.max(held.len());
    }
    assert_eq!((most, read), (INDEXES, sealed.shards.len() as u64));
}

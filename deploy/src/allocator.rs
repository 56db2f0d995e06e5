//! glibc's allocator, told how a fetch worker uses memory.

/// Has buffers of 256 KiB and more go back to the kernel when they are freed, and few arenas. By itself glibc stops to
/// give such buffers back after it has seen one, and has eight arenas for each core: hundreds of bodies of all sizes,
/// allocated on one thread and freed on another, then leave holes that double what a worker holds.
///
/// To be called while there is one thread. Variables (`MALLOC_ARENA_MAX` and the like) do the same, but somebody has to
/// set them.
#[cfg(all(target_os = "linux", target_env = "gnu"))]
#[allow(unsafe_code, reason = "there is no other way to mallopt(3)")]
pub(crate) fn give_buffers_back() {
    const OPTIONS: [(libc::c_int, libc::c_int); 3] = [
        (libc::M_MMAP_THRESHOLD, 256 << 10),
        // Of what lies free at the end of the heap; small buffers come and go there all the time.
        (libc::M_TRIM_THRESHOLD, 4 << 20),
        (libc::M_ARENA_MAX, 2),
    ];
    for (option, value) in OPTIONS {
        // SAFETY: it takes two numbers, and no other thread is there to allocate meanwhile. One that is refused changes
        // nothing.
        unsafe { libc::mallopt(option, value) };
    }
}

/// Other allocators are left as they are.
#[cfg(not(all(target_os = "linux", target_env = "gnu")))]
pub(crate) fn give_buffers_back() {}

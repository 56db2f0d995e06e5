//! Frames between an agent and its rank processes, over the rank's stdin and stdout: a length (4 bytes, big endian) and
//! that many bytes. The agent sends a [`Setup`](crate::learn::context::Setup) in JSON, then encoded
//! `CoordinatorMessage`s. The rank sends encoded `RankMessage`s; those without a run are for the agent itself.

use std::io::{self, Read, Write};

use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};

/// A longer frame is an error.
const LIMIT: u32 = 64 << 20;

/// Reads a frame; None at the end.
pub(crate) fn read(from: &mut impl Read) -> io::Result<Option<Vec<u8>>> {
    let mut length = [0; 4];
    match from.read_exact(&mut length) {
        Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => return Ok(None),
        read => read?,
    }
    let mut frame = vec![0; checked(u32::from_be_bytes(length))?];
    from.read_exact(&mut frame)?;
    Ok(Some(frame))
}

/// Writes a frame.
pub(crate) fn write(to: &mut impl Write, frame: &[u8]) -> io::Result<()> {
    to.write_all(&(frame.len() as u32).to_be_bytes())?;
    to.write_all(frame)?;
    to.flush()
}

/// [`read`], for the agent.
pub(crate) async fn receive(from: &mut (impl AsyncRead + Unpin)) -> io::Result<Option<Vec<u8>>> {
    let length = match from.read_u32().await {
        Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => return Ok(None),
        read => read?,
    };
    let mut frame = vec![0; checked(length)?];
    from.read_exact(&mut frame).await?;
    Ok(Some(frame))
}

/// [`write`], for the agent.
pub(crate) async fn send(to: &mut (impl AsyncWrite + Unpin), frame: &[u8]) -> io::Result<()> {
    to.write_u32(frame.len() as u32).await?;
    to.write_all(frame).await?;
    to.flush().await
}

fn checked(length: u32) -> io::Result<usize> {
    if length > LIMIT {
        return Err(io::Error::new(io::ErrorKind::InvalidData, format!("a frame of {length} bytes")));
    }
    Ok(length as usize)
}

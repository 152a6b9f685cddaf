//! Memory handed to another process: as a dma-buf, without a copy, or through a pipe or shared memory, with one.

use std::path::Path;

use anyhow::Result;

use crate::session::Session;
use crate::vulkan::Card;

pub(crate) fn run(session: &mut Session, _: Option<&Card>) -> Result<()> {
    if !Path::new("/dev/udmabuf").exists() {
        session.absent("", "there is no /dev/udmabuf: the kernel was built without CONFIG_UDMABUF");
        return Ok(());
    }
    session.absent("", "exports are not part of this version");
    Ok(())
}

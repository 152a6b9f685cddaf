//! The watch queue: a bounded ring of small records that says what happened to which object.

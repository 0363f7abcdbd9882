//! The image tool.

pub mod check;
pub mod image_file;
pub mod inspect;

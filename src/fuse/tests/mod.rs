//! The whole room at work: requests in, answers out, over the golden images.

mod content;
mod golden;
mod guest;
mod hostile;
mod listing;
mod session;

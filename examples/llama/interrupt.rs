//! Ctrl-C ends the text that is being generated. At any other time, and when it is pressed again,
//! it ends the program.

use std::sync::atomic::{AtomicU8, Ordering};

const IDLE: u8 = 0;
const GENERATING: u8 = 1;
const INTERRUPTED: u8 = 2;

/// The exit status of a program that was ended by SIGINT.
pub const EXIT_STATUS: u8 = 130;

static STATE: AtomicU8 = AtomicU8::new(IDLE);

/// Handles Ctrl-C from now on.
pub fn install() -> Result<(), ctrlc::Error> {
    ctrlc::set_handler(|| {
        if STATE
            .compare_exchange(GENERATING, INTERRUPTED, Ordering::SeqCst, Ordering::SeqCst)
            .is_err()
        {
            std::process::exit(i32::from(EXIT_STATUS));
        }
    })
}

/// While this exists, Ctrl-C is recorded instead of ending the program.
pub struct Generating(());

impl Generating {
    pub fn start() -> Self {
        STATE.store(GENERATING, Ordering::SeqCst);
        Self(())
    }

    pub fn interrupted(&self) -> bool {
        STATE.load(Ordering::SeqCst) == INTERRUPTED
    }
}

impl Drop for Generating {
    fn drop(&mut self) {
        STATE.store(IDLE, Ordering::SeqCst);
    }
}

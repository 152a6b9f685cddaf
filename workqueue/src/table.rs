//! The state table of work items, as data: what every operation does in every state.
//!
//! A cell names the new state, what happens to list and timer, and the answer. All of it moves in one step under the
//! pool's lock, together with the running bit and the count of waiting cancels, so there is never a state without its
//! list entry or timer. (Were the state changed by compare-and-swap and the list touched afterwards, a model checker
//! finds items that run on two workers at once, or that are queued and on no list.) That is also why no cell leads to
//! [`Word::Cancel`]: a cancel that does not wait has decided before anybody can look. The column stays because it says
//! what must happen if a cancel were found undecided: the operation wins, and the cancel has come too late.
//!
//! Every table test is generated from these rows.

/// What an item is about. Whether a worker holds it is said by the running bit, in any state.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(crate) enum Word {
    /// Not queued.
    #[default]
    Idle,
    /// Its timer runs.
    Timer,
    /// Queued; with the running bit: a round that the worker owes.
    Task,
    /// Running, and not queued again.
    Exec,
    /// A cancel that does not wait is deciding. Never visible here.
    Cancel,
}

/// The new state.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Next {
    To(Word),
    /// Exec with the running bit, else Idle.
    Rest,
}

/// What happens to list and timer. Enqueue and take-off mean the owed round if the running bit is set.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Act {
    Nothing,
    Enqueue,
    StartTimer,
    StopTimer,
    RestartTimer,
    TakeOff,
    TakeOffAndStartTimer,
    StopTimerAndEnqueue,
    /// The worker calls the function.
    Run,
    /// The worker lets go of the item: the running bit falls.
    LetGo,
}

/// What the caller is told.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Answer {
    No,
    Yes,
    /// The running bit.
    Running,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Cell {
    pub(crate) next: Next,
    pub(crate) act: Act,
    pub(crate) answer: Answer,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Operation {
    Queue,
    QueueDelayed,
    /// With a time that is not zero.
    ModifyDelayed,
    /// With no time to wait.
    ModifyNow,
    TimerFires,
    /// A worker took the item off a ready list.
    Taken,
    Returns,
    /// Both cancels that wait, once the count of waiting cancels is raised; the wait comes after.
    CancelSync,
    /// The cancel that never waits.
    Cancel,
    /// The wait comes after.
    Flush,
    FlushDelayed,
}

impl Operation {
    #[cfg(test)]
    pub(crate) const ALL: [Self; 11] = [
        Self::Queue,
        Self::QueueDelayed,
        Self::ModifyDelayed,
        Self::ModifyNow,
        Self::TimerFires,
        Self::Taken,
        Self::Returns,
        Self::CancelSync,
        Self::Cancel,
        Self::Flush,
        Self::FlushDelayed,
    ];
}

const fn to(word: Word, act: Act, answer: Answer) -> Cell {
    Cell { next: Next::To(word), act, answer }
}

const fn rest(act: Act, answer: Answer) -> Cell {
    Cell { next: Next::Rest, act, answer }
}

/// What `operation` does to an item in state `word`.
pub(crate) fn cell(operation: Operation, word: Word) -> Cell {
    TABLE[operation as usize][word as usize]
}

use Act::{
    Enqueue, LetGo, Nothing, RestartTimer, Run, StartTimer, StopTimer, StopTimerAndEnqueue, TakeOff,
    TakeOffAndStartTimer,
};
use Answer::{No, Running, Yes};
use Word::{Cancel, Exec, Idle, Task, Timer};

/// Rows in the order of [`Operation`], columns in that of [`Word`].
#[rustfmt::skip]
const TABLE: [[Cell; 5]; 11] = [
    // Queue: one more run, however often it is asked for.
    [to(Task, Enqueue, Yes), to(Timer, Nothing, No), to(Task, Nothing, No), to(Task, Enqueue, Yes), to(Task, Enqueue, Yes)],
    // QueueDelayed
    [to(Timer, StartTimer, Yes), to(Timer, Nothing, No), to(Task, Nothing, No), to(Timer, StartTimer, Yes), to(Timer, StartTimer, Yes)],
    // ModifyDelayed: as QueueDelayed, except that it moves what is pending; the answer says whether something was.
    [to(Timer, StartTimer, No), to(Timer, RestartTimer, Yes), to(Timer, TakeOffAndStartTimer, Yes), to(Timer, StartTimer, No), to(Timer, StartTimer, No)],
    // ModifyNow
    [to(Task, Enqueue, No), to(Task, StopTimerAndEnqueue, Yes), to(Task, Nothing, Yes), to(Task, Enqueue, No), to(Task, Enqueue, No)],
    // TimerFires: the timer has stopped by itself.
    [to(Idle, Nothing, No), to(Task, Enqueue, Yes), to(Task, Nothing, No), to(Exec, Nothing, No), to(Task, Enqueue, Yes)],
    // Taken: everything but Task drops the entry.
    [to(Idle, Nothing, No), to(Timer, Nothing, No), to(Exec, Run, Yes), to(Exec, Nothing, No), to(Exec, Run, Yes)],
    // Returns: Idle was cancelled meanwhile, Timer will be queued by its timer, Task is the round owed.
    [to(Idle, LetGo, No), to(Timer, LetGo, No), to(Exec, Run, Yes), to(Idle, LetGo, No), to(Cancel, LetGo, No)],
    // CancelSync
    [to(Idle, Nothing, No), to(Idle, StopTimer, Yes), to(Idle, TakeOff, Yes), to(Idle, Nothing, No), to(Idle, TakeOff, Yes)],
    // Cancel
    [to(Idle, Nothing, No), rest(StopTimer, Yes), rest(TakeOff, Yes), to(Exec, Nothing, No), rest(StopTimer, Yes)],
    // Flush: changes nothing.
    [to(Idle, Nothing, Running), to(Timer, Nothing, Yes), to(Task, Nothing, Yes), to(Exec, Nothing, Yes), to(Cancel, Nothing, Yes)],
    // FlushDelayed: the timer is cut short.
    [to(Idle, Nothing, Running), to(Task, StopTimerAndEnqueue, Yes), to(Task, Nothing, Yes), to(Exec, Nothing, Yes), to(Task, StopTimerAndEnqueue, Yes)],
];

#[cfg(test)]
mod tests {
    use super::*;

    const WORDS: [Word; 5] = [Idle, Timer, Task, Exec, Cancel];

    /// What list and timer an item must have in a state.
    fn belongs(word: Word) -> (bool, bool) {
        (word == Task, word == Timer)
    }

    #[test]
    fn no_cell_leaves_a_state_without_its_list_entry_or_timer() {
        for operation in Operation::ALL {
            for word in [Idle, Timer, Task, Exec] {
                for running in [false, true] {
                    if word == Exec && !running {
                        continue;
                    }
                    let (mut queued, mut timer) = belongs(word);
                    let Cell { next, act, .. } = cell(operation, word);
                    match operation {
                        Operation::TimerFires if word != Timer => continue,
                        Operation::TimerFires => timer = false,
                        Operation::Taken if word != Task || running => continue,
                        Operation::Returns if !running => continue,
                        _ => {}
                    }
                    match act {
                        Nothing | LetGo => {}
                        Enqueue => assert!(!std::mem::replace(&mut queued, true)),
                        StartTimer => assert!(!std::mem::replace(&mut timer, true)),
                        StopTimer => assert!(std::mem::take(&mut timer)),
                        RestartTimer => assert!(timer),
                        TakeOff | Run => assert!(std::mem::take(&mut queued)),
                        TakeOffAndStartTimer => {
                            assert!(std::mem::take(&mut queued) && !std::mem::replace(&mut timer, true));
                        }
                        StopTimerAndEnqueue => {
                            assert!(std::mem::take(&mut timer) && !std::mem::replace(&mut queued, true));
                        }
                    }
                    let word = match next {
                        Next::To(word) => word,
                        Next::Rest if running => Exec,
                        Next::Rest => Idle,
                    };
                    assert_ne!(word, Cancel, "{operation:?}");
                    assert_eq!((queued, timer), belongs(word), "{operation:?} {word:?} {running}");
                }
            }
        }
    }

    #[test]
    fn an_undecided_cancel_loses_to_every_operation_that_queues() {
        for operation in Operation::ALL {
            let queues = |cell: Cell| matches!(cell.next, Next::To(Task | Timer)) && cell.act != Nothing;
            let from_idle = cell(operation, Idle);
            if queues(from_idle) {
                assert!(queues(cell(operation, Cancel)), "{operation:?}");
            }
            assert_eq!(WORDS.len(), TABLE[operation as usize].len());
        }
    }
}

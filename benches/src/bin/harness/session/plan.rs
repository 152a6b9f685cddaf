//! What is to be compared: contenders, goals, and how a row is taken.

use anyhow::Result;

use crate::report::{Better, GoalOf};

/// One way of doing something. A call does it and returns one or more values of the row's unit.
pub(crate) struct Contender<'a> {
    pub(super) name: String,
    pub(super) run: Box<dyn FnMut() -> Result<Vec<f64>> + 'a>,
}

impl<'a> Contender<'a> {
    /// One that gives one value a call.
    pub(crate) fn new(name: &str, mut run: impl FnMut() -> Result<f64> + 'a) -> Self {
        Self::many(name, move || Ok(vec![run()?]))
    }

    /// One that gives several values a call.
    pub(crate) fn many(name: &str, run: impl FnMut() -> Result<Vec<f64>> + 'a) -> Self {
        Self { name: name.into(), run: Box::new(run) }
    }

    pub(crate) fn rename(&mut self, name: &str) {
        self.name = name.into();
    }
}

/// What should be reached, by whom it is measured.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Goal {
    pub(crate) of: GoalOf,
    pub(crate) value: f64,
    pub(crate) slack: f64,
}

impl Goal {
    /// For ours / peer.
    pub(crate) fn ratio(value: f64) -> Option<Self> {
        Some(Self { of: GoalOf::Ratio, value, slack: 0.0 })
    }

    /// For ours, whatever the peer.
    pub(crate) fn ours(value: f64) -> Option<Self> {
        Some(Self { of: GoalOf::Ours, value, slack: 0.0 })
    }

    /// For (ours - slack) / peer.
    pub(crate) fn ratio_plus(value: f64, slack: f64) -> Option<Self> {
        Some(Self { of: GoalOf::Ratio, value, slack })
    }
}

/// Which of a round's values stands for the round.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Stat {
    Median,
    P99,
}

/// A comparison to be made.
pub(crate) struct Plan<'a> {
    pub(super) name: String,
    pub(super) unit: &'static str,
    pub(super) better: Better,
    pub(super) clock: &'static str,
    pub(super) placement: String,
    pub(super) stat: Stat,
    pub(super) control: bool,
    /// Not a row, only a point of a curve.
    pub(super) quiet: bool,
    pub(super) rounds: Option<usize>,
    /// The rounds are made, however long they take.
    pub(super) patient: bool,
    pub(super) ours: Contender<'a>,
    pub(super) ours_goal: Option<Goal>,
    pub(super) peers: Vec<(Contender<'a>, Option<Goal>)>,
}

impl<'a> Plan<'a> {
    pub(crate) fn new(name: impl Into<String>, unit: &'static str, ours: Contender<'a>) -> Self {
        Self {
            name: name.into(),
            unit,
            better: Better::Lower,
            clock: "wall",
            placement: String::new(),
            stat: Stat::Median,
            control: false,
            quiet: false,
            rounds: None,
            patient: false,
            ours,
            ours_goal: None,
            peers: Vec::new(),
        }
    }

    pub(crate) fn against(mut self, peer: Contender<'a>, goal: Option<Goal>) -> Self {
        self.peers.push((peer, goal));
        self
    }

    /// A goal that no peer has a part in. The row of the first peer carries it.
    pub(crate) fn goal(mut self, goal: Option<Goal>) -> Self {
        self.ours_goal = goal;
        self
    }

    pub(crate) fn higher_is_better(mut self) -> Self {
        self.better = Better::Higher;
        self
    }

    pub(crate) fn clock(mut self, clock: &'static str) -> Self {
        self.clock = clock;
        self
    }

    pub(crate) fn placement(mut self, text: impl Into<String>) -> Self {
        self.placement = text.into();
        self
    }

    pub(crate) fn p99(mut self) -> Self {
        self.stat = Stat::P99;
        self
    }

    pub(crate) fn control(mut self) -> Self {
        self.control = true;
        self
    }

    pub(crate) fn quiet(mut self) -> Self {
        self.quiet = true;
        self
    }

    /// At most so many rounds: for what takes long.
    pub(crate) fn at_most(mut self, rounds: usize) -> Self {
        self.rounds = Some(rounds);
        self
    }

    /// Exactly so many rounds, in every mode: for what takes long and differs much from one round to the next.
    pub(crate) fn exactly(mut self, rounds: usize) -> Self {
        (self.rounds, self.patient) = (Some(rounds), true);
        self
    }
}

"""What leaves a client, recorded where it leaves: one module for each framework, each an optional extra."""

from gradleak.adapters.recorder import LeakWarning, Policy, Recorder

__all__ = ["LeakWarning", "Policy", "Recorder"]

"""Published attacks as choices of parts, one file each; a docstring cites the source and states every deviation."""

from gradleak.attacks.matching.papers.dlg import dlg
from gradleak.attacks.matching.papers.idlg import idlg
from gradleak.attacks.matching.papers.inverting_gradients import inverting_gradients
from gradleak.attacks.matching.papers.prior_matching import prior_matching
from gradleak.attacks.matching.papers.tableak import tableak

__all__ = ["dlg", "idlg", "inverting_gradients", "prior_matching", "tableak"]

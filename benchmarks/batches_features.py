"""Batches on the paper's LeNet, labels unknown, with feature_matching(), which auto() takes for them.

Target: as in batches.py, whose victims these are.
"""

from __future__ import annotations

from batches import main

if __name__ == "__main__":
    main(features=True)

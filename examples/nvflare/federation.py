"""Two clients train for two rounds in NVFlare's simulator; what leaves them is captured.

From this folder, with ``pip install 'gradleak[nvflare]'``; ``python federation.py DIFF`` has clients send differences::

    python federation.py
    gradleak attack captured --round 0 --client site-1 --out result
"""

import sys
from pathlib import Path

from net import Net
from nvflare.app_opt.pt.recipes.fedavg import FedAvgRecipe
from nvflare.client.config import TransferType
from nvflare.recipe import SimEnv

from gradleak.adapters.nvflare import CaptureFilter

if __name__ == "__main__":
    transfer = TransferType(sys.argv[1] if len(sys.argv) > 1 else "FULL")
    recipe = FedAvgRecipe(
        name="gradleak", model=Net(), min_clients=2, num_rounds=2, train_script="client.py",
        params_transfer_type=transfer,
    )  # fmt: skip
    recipe.add_client_file("net.py")
    folder = str(Path("captured").resolve())
    recipe.add_client_input_filter(CaptureFilter(folder, "net:recorder", examples=4), tasks=["train"])
    # Privacy filters come first: what is added last sees what leaves.
    recipe.add_client_output_filter(CaptureFilter(folder, "net:recorder", examples=4), tasks=["train"])
    recipe.execute(SimEnv(num_clients=2, workspace_root="simulation"))

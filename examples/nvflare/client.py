"""What each client runs: one step of SGD on its own pictures."""

import nvflare.client as flare
import torch
from net import RATE, Net, data_of


def main() -> None:
    """Train whenever the server asks."""
    flare.init()
    inputs, labels = data_of(flare.get_site_name())
    net = Net()
    while flare.is_running():
        received = flare.receive()
        net.load_state_dict({k: torch.as_tensor(v) for k, v in received.params.items()})
        optimizer = torch.optim.SGD(net.parameters(), lr=RATE)
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(net(inputs), labels).backward()
        optimizer.step()
        flare.send(flare.FLModel(params=net.state_dict()))


if __name__ == "__main__":
    main()

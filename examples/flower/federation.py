"""Two clients train for two rounds in Flower's simulation; what leaves them is captured.

From this folder, with ``pip install 'gradleak[flower]'``::

    python federation.py
    gradleak attack captured --round 1 --client 0 --out result
"""

import sys

import torch
from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg
from flwr.simulation import run_simulation
from net import data_of, make_net

import gradleak as gl
from gradleak.adapters import Recorder
from gradleak.adapters.flower import CaptureMod, CaptureStrategy

RATE = 0.05
POLICY = sys.argv[1] if len(sys.argv) > 1 else "observe"

# What Flower does not know: the model's factory, what an input is, and how a client trains.
training, space = gl.FedAvg(lr=RATE), gl.ImageSpace((1, 8, 8))
recorder = Recorder(folder="captured", model=make_net, space=space, training=training, policy=POLICY)
server_side = Recorder(folder="captured-server", model=make_net, space=space, training=training)

app = ClientApp(mods=[CaptureMod(recorder)])  # privacy mods come after it in the list


@app.train()
def train(message: Message, context: Context) -> Message:
    """One step of SGD on the client's own pictures."""
    net = make_net()
    net.load_state_dict(message.content["arrays"].to_torch_state_dict())
    inputs, labels = data_of(int(context.node_config["partition-id"]))
    optimizer = torch.optim.SGD(net.parameters(), lr=RATE)
    torch.nn.functional.cross_entropy(net(inputs), labels).backward()
    optimizer.step()
    content = RecordDict(
        {"arrays": ArrayRecord(net.state_dict()), "metrics": MetricRecord({"num-examples": len(inputs)})}
    )
    return Message(content=content, reply_to=message)


server = ServerApp()


@server.main()
def main(grid: Grid, context: Context) -> None:
    """Two rounds of federated averaging."""
    strategy = CaptureStrategy(FedAvg(fraction_evaluate=0.0), server_side)
    strategy.start(grid=grid, initial_arrays=ArrayRecord(make_net().state_dict()), num_rounds=2)


if __name__ == "__main__":
    run_simulation(server, app, num_supernodes=2)

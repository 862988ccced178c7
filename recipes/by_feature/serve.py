#!/usr/bin/env python
"""A server that gathers requests to batches, and lets each image leave where it is sure.

    pip install litserve
    python recipes/by_feature/serve.py local-dir:RUN --port 8000

It answers POST /predict with {"pixels": BASE64}, the bytes of an image of the network's size (height, width, channels),
uint8, by {"label": ..., "exit": ...}. `serve_load.py` beside this file measures what early exit is worth here.

LitServe was chosen over Ray Serve: it is one small package over FastAPI, while Ray brings the scheduler of a cluster
along. Both gather requests to batches alike. A batch is answered when the last of its images is done.
"""
import argparse
import base64

import litserve
import numpy as np
import timm
import torch
from timm.data import resolve_data_config

import timm_selfdistill


class Classifier(litserve.LitAPI):
    """Classifies images in batches: `early` exit, `whole` network, or `exit0`, `exit1`, ...: truncated there."""

    def __init__(self, checkpoint, kind='early', threads=1, **batching):
        super().__init__(**batching)
        self.checkpoint, self.kind, self.threads = checkpoint, kind, threads

    def setup(self, device):
        torch.set_num_threads(self.threads)
        model = timm.create_model(self.checkpoint, pretrained=True).eval().to(device)
        config = resolve_data_config(model=model)
        self.device, self.shape = device, (*config['input_size'][1:], config['input_size'][0])
        self.mean, self.std = (torch.tensor(config[name], device=device).view(-1, 1, 1) for name in ('mean', 'std'))
        if self.kind == 'early':
            self.run = timm_selfdistill.EarlyExit(model)
        else:
            last = model.num_exits - 1
            self.run = model.truncate(last if self.kind == 'whole' else int(self.kind.removeprefix('exit'))).eval()

    def decode_request(self, request):
        pixels = np.frombuffer(base64.b64decode(request['pixels']), np.uint8)
        if pixels.size != np.prod(self.shape):
            raise ValueError(f'{pixels.size} bytes: expected {self.shape} (height, width, channels).')
        return torch.from_numpy(pixels.reshape(self.shape).copy()).permute(2, 0, 1)

    def batch(self, inputs):
        return torch.stack(inputs)

    @torch.inference_mode()
    def predict(self, images):
        out = self.run((images.to(self.device) / 255 - self.mean) / self.std)
        if self.kind != 'early':
            return [dict(label=label, exit=None) for label in out.argmax(-1).tolist()]
        return [dict(label=a, exit=b) for a, b in zip(out.logits.argmax(-1).tolist(), out.exit_index.tolist())]

    def unbatch(self, output):
        return output

    def encode_response(self, output):
        return output


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument('checkpoint', help='name of timm with weights, local-dir:RUN, or hf-hub:org/name')
    parser.add_argument('--kind', default='early', help='early, whole, or exit0, exit1, ...')
    parser.add_argument('--port', type=int, default=8000)
    parser.add_argument('--batch-size', type=int, default=16, help='images of a batch at most')
    parser.add_argument('--wait', type=float, default=0.005, help='seconds that a request waits for others')
    parser.add_argument('--threads', type=int, default=1)
    args = parser.parse_args()
    api = Classifier(
        args.checkpoint, args.kind, args.threads, max_batch_size=args.batch_size, batch_timeout=args.wait)
    litserve.LitServer(api).run(
        host='127.0.0.1', port=args.port, num_api_servers=1, generate_client_file=False, log_level='warning')


if __name__ == '__main__':
    main()

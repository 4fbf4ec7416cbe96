"""Mistakes that a type checker reports; mypy reports an `ignore` without a mistake too. Not to be run."""

import torch

import contrastive_kernels as ck

a, b = torch.randn(2, 8, 4).unbind(0)

ck.nt_xent_loss(a, b, tau=0.1)  # type: ignore[call-overload]
ck.nt_xent_loss(a, b, temperature="warm")  # type: ignore[call-overload]
ck.nt_xent_loss([1.0], b)  # type: ignore[call-overload]
ck.info_nce_loss(a, b, negative_mode="all")  # type: ignore[call-overload]
ck.info_nce_loss(a)  # type: ignore[call-overload]
ck.alignment_loss(a, wieght=None)  # type: ignore[call-arg]
ck.similarity_sum(a, b, term="band")  # type: ignore[arg-type]
ck.Band(0.1)  # type: ignore[call-arg]
ck.nt_xent_loss(a, b, return_stats=True).backward()  # type: ignore[attr-defined]
loss, stats = ck.clip_loss(a, b, 10.0, return_stats=True)
stats.acuracy.mean()  # type: ignore[attr-defined]

ck.NTXentLoss(tau=0.1)  # type: ignore[call-arg]
ck.NTXentLoss(0.1, reduktion="sum")  # type: ignore[call-arg]
ck.InfoNCELoss(0.1, negative_mode="all")  # type: ignore[arg-type]
ck.ArCLLoss(0.1, positive="max")  # type: ignore[arg-type]
ck.MoCoLoss(4, queue_size="many")  # type: ignore[arg-type]
ck.ClipLoss(temperature_=0.1)  # type: ignore[call-arg]
ck.encode_in_chunks(a, b, 2)  # type: ignore[arg-type]
ck.ChunkedEncoder(torch.nn.Linear(4, 2), chunks=2)  # type: ignore[call-arg]

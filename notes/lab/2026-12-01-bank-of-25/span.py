"""Variants of gates from the sums of the ridge regression, among them a softmax of N linear scores in the span of its solution."""

import torch


def centred(means, weights=None):
    """Targets of the ridge regression, (N, h), for adapters with these weights."""
    weights = torch.ones(len(means), dtype=means.dtype) if weights is None else weights
    weighted = weights[:, None] * means
    return weighted - (weights / weights.sum())[:, None] * weighted.sum(0, keepdim=True)


def ridge(total, targets, strength, power=0.0):
    """Ridge regression; the penalty of a feature is its mean square to the given power."""
    diagonal = total.diagonal()
    matrix = total + torch.diag(strength * (diagonal / diagonal.mean()).pow(power) * diagonal.mean())
    return torch.cholesky_solve(targets.t(), torch.linalg.cholesky(matrix)).t()


def discriminant(parts, means, strength):
    """Linear discriminant with the pooled covariance; its constant is put on the direction whose product with all inputs is nearest to 1."""
    pooled = sum(part - torch.outer(mean, mean) for part, mean in zip(parts, means, strict=True)) / len(parts)
    gate = ridge(pooled, means, strength)
    one = ridge(sum(parts) / len(parts), means.mean(0, keepdim=True), 1e-3)
    return gate - 0.5 * (gate * means).sum(1)[:, None] * one


def span_softmax(parts, means, strength, penalty, samples=64, iterations=30):
    """Softmax of N scores x P^T, P the uncentred ridge rows, on samples of each adapter's normal distribution of the scores; (N, h)."""
    count = len(means)
    rows = ridge(sum(parts), means, strength)
    centre = 8 * (torch.eye(count, dtype=torch.float64) - 1 / count)
    half = torch.randn(samples // 2, count, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    noise, scores = torch.cat([half, -half]), []
    for part, mean in zip(parts, means @ rows.t(), strict=True):
        values, vectors = torch.linalg.eigh(rows @ part @ rows.t() - torch.outer(mean, mean))
        scores.append(mean + (noise * values.clamp(min=0).sqrt()) @ vectors.t())
    inputs, labels = torch.cat(scores), torch.arange(count).repeat_interleave(samples)
    scale, change = inputs.square().mean(0).sqrt(), torch.zeros(count, count, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([change], max_iter=iterations, line_search_fn="strong_wolfe")

    def closure():
        optimizer.zero_grad()
        loss = torch.nn.functional.cross_entropy(inputs @ (centre + change / scale).t(), labels) + penalty * change.square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    return (centre + change / scale).detach() @ rows

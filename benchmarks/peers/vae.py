"""A variational autoencoder as most scripts have it: sigmoid outputs, summed binary cross-entropy, plain Adam.

Written for this comparison, after the usual example; not anybody's code. The hidden layers are tanh, as in the course.
"""

import torch
from torch import nn
from torch.nn import functional as F


class VAE(nn.Module):
    def __init__(self, hidden=400, z_dim=20):
        super().__init__()
        self.to_hidden = nn.Linear(784, hidden)
        self.to_mu = nn.Linear(hidden, z_dim)
        self.to_logvar = nn.Linear(hidden, z_dim)
        self.from_z = nn.Linear(z_dim, hidden)
        self.to_pixels = nn.Linear(hidden, 784)

    def encode(self, x):
        h = torch.tanh(self.to_hidden(x))
        return self.to_mu(h), self.to_logvar(h)

    def reparameterize(self, mu, logvar):
        std = torch.exp(0.5 * logvar)
        return mu + torch.randn_like(std) * std

    def decode(self, z):
        return torch.sigmoid(self.to_pixels(torch.tanh(self.from_z(z))))

    def forward(self, x):
        mu, logvar = self.encode(x.view(-1, 784))
        return self.decode(self.reparameterize(mu, logvar)), mu, logvar


def loss_function(reconstruction, x, mu, logvar):
    """The negative evidence lower bound, summed over the batch."""
    bce = F.binary_cross_entropy(reconstruction, x.view(-1, 784), reduction="sum")
    kld = -0.5 * torch.sum(1 + logvar - mu.pow(2) - logvar.exp())
    return bce + kld


def train_epoch(model, optimizer, loader):
    """One epoch; returns the mean loss per image."""
    model.train()
    total, count = 0.0, 0
    for x, _ in loader:
        optimizer.zero_grad()
        reconstruction, mu, logvar = model(x)
        loss = loss_function(reconstruction, x, mu, logvar)
        loss.backward()
        total += loss.item()
        count += len(x)
        optimizer.step()
    return total / count

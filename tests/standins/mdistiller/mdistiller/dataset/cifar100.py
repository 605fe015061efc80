from torch.utils.data import DataLoader
from torchvision import datasets, transforms


def get_data_folder():
    return "/nowhere"


class Indexed(datasets.CIFAR100):
    def __getitem__(self, index):
        image, target = super().__getitem__(index)
        return image, target, index


def loaders(batch_size, val_batch_size, num_workers):
    augmented = transforms.Compose([transforms.RandomHorizontalFlip(), transforms.ToTensor()])
    train = Indexed(get_data_folder(), train=True, download=True, transform=augmented)
    val = datasets.CIFAR100(get_data_folder(), train=False, download=True, transform=transforms.ToTensor())
    return DataLoader(train, batch_size, shuffle=True, num_workers=num_workers), DataLoader(val, val_batch_size)

// Package identity asks a CSI driver who it is and whether it is ready.
package identity

import (
	"context"
	"errors"
	"time"

	"github.com/container-storage-interface/spec/lib/go/csi"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
)

func ask(socket string, limit time.Duration, call func(context.Context, csi.IdentityClient) error) error {
	connection, err := grpc.NewClient("unix:"+socket, grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		return err
	}
	defer connection.Close()
	ctx, cancel := context.WithTimeout(context.Background(), limit)
	defer cancel()
	return call(ctx, csi.NewIdentityClient(connection))
}

// Name of the driver; a driver that is not there is waited for.
func Name(socket string, limit time.Duration) (name string, err error) {
	err = ask(socket, limit, func(ctx context.Context, driver csi.IdentityClient) error {
		info, err := driver.GetPluginInfo(ctx, &csi.GetPluginInfoRequest{}, grpc.WaitForReady(true))
		name = info.GetName()
		return err
	})
	return name, err
}

// Probe is nil when the driver says that it is ready.
func Probe(socket string, limit time.Duration) error {
	return ask(socket, limit, func(ctx context.Context, driver csi.IdentityClient) error {
		said, err := driver.Probe(ctx, &csi.ProbeRequest{})
		if err == nil && said.GetReady() != nil && !said.GetReady().GetValue() {
			err = errors.New("the driver is not ready")
		}
		return err
	})
}

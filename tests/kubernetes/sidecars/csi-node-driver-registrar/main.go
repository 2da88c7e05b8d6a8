// Tells the kubelet of a CSI driver, as the sidecar of this name does, with the flags of it that the chart uses. The sidecar
// itself is not published as a Go module.
package main

import (
	"context"
	"flag"
	"log"
	"net"
	"net/http"
	"os"
	"os/signal"
	"path/filepath"
	"syscall"
	"time"

	"google.golang.org/grpc"
	registration "k8s.io/kubelet/pkg/apis/pluginregistration/v1"

	"ashlar.io/tests/kubernetes/sidecars/identity"
)

type server struct {
	registration.UnimplementedRegistrationServer
	name     string
	endpoint string
}

func (s *server) GetInfo(context.Context, *registration.InfoRequest) (*registration.PluginInfo, error) {
	return &registration.PluginInfo{
		Type:              registration.CSIPlugin,
		Name:              s.name,
		Endpoint:          s.endpoint,
		SupportedVersions: []string{"1.0.0"},
	}, nil
}

func (s *server) NotifyRegistrationStatus(
	_ context.Context, status *registration.RegistrationStatus,
) (*registration.RegistrationStatusResponse, error) {
	if !status.PluginRegistered {
		log.Fatalf("the kubelet refused the driver: %s", status.Error)
	}
	log.Printf("the kubelet knows %s", s.name)
	return &registration.RegistrationStatusResponse{}, nil
}

func main() {
	driver := flag.String("csi-address", "/run/csi/socket", "socket of the driver")
	endpoint := flag.String("kubelet-registration-path", "", "the same socket as the kubelet sees it")
	directory := flag.String("plugin-registration-path", "/registration", "directory that the kubelet watches")
	health := flag.String("http-endpoint", "", "address of /healthz")
	timeout := flag.Duration("timeout", time.Second, "of calls to the driver")
	flag.Int("v", 0, "taken and not used")
	flag.Parse()

	name, err := identity.Name(*driver, *timeout)
	if err != nil {
		log.Fatalf("the driver's name: %v", err)
	}
	socket := filepath.Join(*directory, name+"-reg.sock")
	if err := os.Remove(socket); err != nil && !os.IsNotExist(err) {
		log.Fatal(err)
	}
	syscall.Umask(0o077)
	listener, err := net.Listen("unix", socket)
	if err != nil {
		log.Fatal(err)
	}
	if *health != "" {
		http.HandleFunc("/healthz", func(answer http.ResponseWriter, _ *http.Request) {
			if _, err := os.Stat(socket); err != nil {
				http.Error(answer, err.Error(), http.StatusNotFound)
			}
		})
		go func() { log.Fatal(http.ListenAndServe(*health, nil)) }()
	}
	calls := grpc.NewServer()
	registration.RegisterRegistrationServer(calls, &server{name: name, endpoint: *endpoint})
	ended := make(chan os.Signal, 1)
	signal.Notify(ended, syscall.SIGTERM)
	go func() {
		<-ended
		_ = os.Remove(socket)
		os.Exit(0)
	}()
	log.Fatal(calls.Serve(listener))
}
